#!/usr/bin/env bash
# What cluster.yaml needs of an AWS account, made once: a bucket, two roles, and a security group that nobody outside can reach.
#   bash deploy/aws.sh BUCKET REGION
set -euo pipefail
bucket=${1:?usage: bash deploy/aws.sh BUCKET REGION} region=${2:?usage: bash deploy/aws.sh BUCKET REGION}
export AWS_DEFAULT_REGION=$region AWS_PAGER=""

location=()
if [ "$region" != us-east-1 ]; then location=(--create-bucket-configuration "LocationConstraint=$region"); fi
aws s3api head-bucket --bucket "$bucket" 2>/dev/null || aws s3api create-bucket --bucket "$bucket" "${location[@]}" >&2

account=$(aws sts get-caller-identity --query Account --output text)
trust='{"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "sts:AssumeRole",
  "Principal": {"Service": "ec2.amazonaws.com"}}]}'
objects='{"Version": "2012-10-17", "Statement": [
  {"Effect": "Allow", "Action": "s3:ListBucket", "Resource": "arn:aws:s3:::'$bucket'"},
  {"Effect": "Allow", "Action": ["s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload"],
   "Resource": "arn:aws:s3:::'$bucket'/*"}]}'
launch='{"Version": "2012-10-17", "Statement": [
  {"Effect": "Allow", "Resource": "*", "Action": "ec2:Describe*"},
  {"Effect": "Allow", "Resource": "*", "Action": "ec2:RunInstances",
   "Condition": {"StringEquals": {"aws:RequestedRegion": "'$region'"}}},
  {"Effect": "Allow", "Resource": "*", "Action": "ec2:CreateTags",
   "Condition": {"StringEquals": {"ec2:CreateAction": "RunInstances"}}},
  {"Effect": "Allow", "Resource": "*", "Action": ["ec2:CreateTags", "ec2:TerminateInstances", "ec2:StopInstances",
   "ec2:StartInstances"], "Condition": {"StringEquals": {"aws:ResourceTag/ray-cluster-name": "ctrdist"}}},
  {"Effect": "Allow", "Action": "iam:PassRole", "Resource": "arn:aws:iam::'$account':role/ctrdist-worker"}]}'

# Spot nodes that are asked for by API need it; an account that ever had some has it.
aws iam get-role --role-name AWSServiceRoleForEC2Spot >/dev/null 2>&1 ||
  aws iam create-service-linked-role --aws-service-name spot.amazonaws.com >&2
for role in ctrdist-head ctrdist-worker; do  # each piece by itself: an earlier try may have been cut off between two
  aws iam get-role --role-name $role >/dev/null 2>&1 ||
    aws iam create-role --role-name $role --assume-role-policy-document "$trust" >&2
  aws iam get-instance-profile --instance-profile-name $role >/dev/null 2>&1 ||
    aws iam create-instance-profile --instance-profile-name $role >&2
  has=$(aws iam get-instance-profile --instance-profile-name $role --query 'InstanceProfile.Roles[0].RoleName' --output text)
  if [ "$has" != $role ]; then aws iam add-role-to-instance-profile --instance-profile-name $role --role-name $role; fi
  aws iam put-role-policy --role-name $role --policy-name objects --policy-document "$objects"
  aws iam attach-role-policy --role-name $role --policy-arn arn:aws:iam::aws:policy/AmazonSSMManagedInstanceCore
done
aws iam put-role-policy --role-name ctrdist-head --policy-name launch-$region --policy-document "$launch"

find_group() {
  aws ec2 describe-security-groups --filters Name=group-name,Values=ctrdist --query 'SecurityGroups[0].GroupId' --output text
}
group=$(find_group)
if [ "$group" = None ]; then
  aws ec2 create-security-group --group-name ctrdist --description "Nodes of ctrdist, among themselves" >&2
  group=$(find_group)
fi
among=$(aws ec2 describe-security-groups --group-ids "$group" --output text \
  --query "SecurityGroups[0].IpPermissions[].UserIdGroupPairs[?GroupId=='$group'].GroupId")
if [ -z "$among" ]; then
  aws ec2 authorize-security-group-ingress --group-id "$group" --protocol -1 --source-group "$group" >&2
fi
echo "$group"
