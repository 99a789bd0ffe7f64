"""The plan: from a cluster's resources to who does what, on made-up clusters."""

import pytest

from ctrdist.errors import UserError
from raycluster import planning
from raycluster.planning import Plan, PlanConfig, make_plan, plan_trials

GIB = 2**30


@pytest.fixture
def on(monkeypatch):
    """`on(CPU=..., GPU=...)`: a cluster of a node with these resources, or `of_nodes`, each with `memory` in GiB, that
    waits in vain for what is `missing`; returns what is asked of it."""

    def set_up(memory: float = 64, of_nodes: tuple[dict, ...] = (), missing: str = "", **resources: float) -> list:
        asked = []

        def waits(wanted: list, seconds: float) -> str:
            asked.append((wanted, seconds))
            return missing

        monkeypatch.setattr(planning, "wait_for", waits)
        nodes = [each | {"memory": memory * GIB} for each in (of_nodes or [resources])]
        monkeypatch.setattr(planning, "alive_nodes", lambda: nodes)
        return asked

    return set_up


def test_a_laptop(on):
    on(CPU=2, memory=4)
    assert make_plan() == Plan(2, 0, 0.25, 1, encoders=2, encoder_gpus=0.0, readers=2, reader_bytes=GIB // 2)


def test_cpus_alone(on):
    on(CPU=64, memory=256)
    plan = make_plan(batch_sizes={"--ctr.batch-size": 1024})
    assert (plan.workers, plan.worker_cpus, plan.threads, plan.encoders, plan.readers) == (16, 1.0, 4, 16, 64)
    assert plan.worker_resources == {"CPU": 1.0}
    assert plan.reader_resources == {"num_cpus": 0.5, "memory": GIB // 2}


def test_every_gpu_trains_and_shares_of_it_encode(on):
    on(CPU=48, GPU=4)
    plan = make_plan(batch_sizes={"--ctr.batch-size": 1024}, gpu_share=0.3)
    assert (plan.workers, plan.gpus, plan.threads) == (4, 1, 12)
    assert (plan.encoders, plan.encoder_gpus) == (12, 0.3)  # three of 0.3 fit on each GPU, not thirteen on four
    assert plan.worker_resources == {"CPU": 1.0, "GPU": 1}


def test_threads_are_those_of_the_nodes_that_train(on):
    train, encode = {"CPU": 48, "GPU": 4, "train": 4}, {"CPU": 8, "GPU": 1}
    on(of_nodes=(train, *[encode] * 8))
    assert make_plan(config=PlanConfig(train_on="train")).threads == 12
    assert make_plan().threads == 8


def test_places_that_have_gone_are_waited_for_and_then_an_error(on):
    plan, missing = Plan(4, 1, 1.0, 8, train_on="train", wait_minutes=5), "1 CPU, 1 GPU, 1 train"
    asked = on(CPU=16, GPU=3, train=3, missing=missing)
    said = f"4 workers of 1 CPU, 1 GPU, 1 train each, .*: no node has a place for {missing} .*run the job again"
    with pytest.raises(UserError, match=said):
        plan.wait_for_places()
    assert asked == [([{"CPU": 1.0, "GPU": 1, "train": 1}] * 4 + [{"CPU": 0.5}], 300)]
    on(CPU=16, GPU=4, train=4)
    plan.wait_for_places()


def test_only_some_gpus_train(on):
    on(CPU=96, GPU=12, train=4)
    plan = make_plan(config=PlanConfig(train_on="train"))
    assert (plan.workers, plan.encoders) == (4, 12)
    assert plan.worker_resources == {"CPU": 1.0, "GPU": 1, "train": 1}
    assert plan_trials(config=PlanConfig(train_on="train"))[1] == 4 and plan_trials()[1] == 12
    with pytest.raises(UserError, match="--sweep.at-once 5: 5 workers, and the cluster has 4 GPUs to train on"):
        plan_trials(at_once=5, config=PlanConfig(train_on="train"))
    with pytest.raises(UserError, match="--workers 5: the cluster has 4 GPUs to train on"):
        make_plan(5, config=PlanConfig(train_on="train"))
    with pytest.raises(UserError, match="no GPU of nodes with the resource 'trian' to train on"):
        make_plan(config=PlanConfig(train_on="trian"))


def test_workers_divide_every_batch(on):
    on(CPU=32)
    assert make_plan(batch_sizes={"--ctr.batch-size": 1024, "--align.batch-size": 12}).workers == 4
    assert make_plan(batch_sizes={"--ctr.batch-size": 1023}).workers == 3
    assert make_plan(batch_sizes={"--ctr.batch-size": 1021}).workers == 1
    with pytest.raises(UserError, match="--ctr.batch-size 1023: does not divide among 2 workers"):
        make_plan(2, {"--ctr.batch-size": 1023})
    with pytest.raises(UserError, match="--ctr.batch-size 0"):
        make_plan(0, {"--ctr.batch-size": 0})


def test_every_number_can_be_given(on):
    on(CPU=64, GPU=4, train=4)
    config = PlanConfig(train_on="train", worker_cpus=3, threads=5, readers=7, reader_gib=2)
    assert make_plan(2, {"--ctr.batch-size": 64}, 3, 0.25, config) == Plan(
        2, 1, 3, 5, encoders=3, encoder_gpus=0.25, readers=7, reader_bytes=2 * GIB, train_on="train"
    )


def test_memory_bounds_the_readers(on):
    on(CPU=32, memory=6)
    assert make_plan().readers == 12
    assert make_plan(config=PlanConfig(reader_gib=4)).readers == 1
    assert make_plan(config=PlanConfig(reader_gib=0)).reader_resources == {"num_cpus": 0.5}
    with pytest.raises(UserError, match="--plan.reader-gib 8: no node has so much memory .* at most 6.0 GiB"):
        make_plan(config=PlanConfig(reader_gib=8))


@pytest.mark.parametrize("resources", [{}, {"CPU": 1}, {"CPU": 0, "GPU": 4}])
def test_too_small_a_cluster_says_what_is_missing(on, resources):
    on(**resources)
    with pytest.raises(UserError, match=f"has {resources.get('CPU', 0)} CPUs .* needs 2: .*--plan.cpus"):
        make_plan()


def test_more_workers_than_room(on):
    on(CPU=8)
    assert make_plan(8).workers == 8
    with pytest.raises(UserError, match="--workers 9: the cluster has 8 CPUs"):
        make_plan(9)
    said = "--plan.worker-cpus 2: 4 workers of 2 CPU each, and a task beside them .*place for 0.5 CPU"
    with pytest.raises(UserError, match=said):
        make_plan(4, config=PlanConfig(worker_cpus=2))


def test_a_worker_reserves_what_the_nodes_that_train_have_room_for(on):
    data, few = {"CPU": 64}, {"CPU": 4, "GPU": 8, "train": 8}
    on(of_nodes=(data, few))
    plan = make_plan()
    assert (plan.workers, plan.worker_cpus) == (8, 0.25), "a GPU node with fewer CPUs than GPUs"
    assert plan_trials(at_once=8)[0].worker_cpus == 0.25
    on(of_nodes=(data, {"CPU": 8, "GPU": 8, "train": 8}))
    assert make_plan().worker_cpus == 1.0
    on(of_nodes=(data, {"GPU": 4}))
    with pytest.raises(UserError, match="4 workers of 0.25 CPU, 1 GPU each.* no node has a place for 1 CPU, 4 GPU"):
        make_plan()
    on(of_nodes=({"CPU": 8, "train": 2}, {"CPU": 8, "GPU": 2}))
    with pytest.raises(UserError, match="no GPU of nodes with the resource 'train' to train on"):
        make_plan(config=PlanConfig(train_on="train"))


def test_on_some_node_there_is_a_place_to_read_beside_all_workers(on):
    three = ({"CPU": 2},) * 3
    on(of_nodes=three)
    assert make_plan(3, config=PlanConfig(worker_cpus=1.5)).workers == 3
    with pytest.raises(UserError, match="3 workers of 1.8 CPU each, .*has a place for 0.5 CPU, 0.5 GiB of memory of"):
        make_plan(3, config=PlanConfig(worker_cpus=1.8))
    with pytest.raises(UserError, match="--plan.worker-cpus 0.9: 6 workers of 0.9 CPU each"):
        plan_trials(at_once=6, config=PlanConfig(worker_cpus=0.9))
    on(CPU=2)
    with pytest.raises(UserError, match="2 workers of 0.75 CPU each"):  # whose own processes take 0.01 CPU each
        plan_trials(at_once=2, config=PlanConfig(worker_cpus=0.75))
    on(of_nodes=three, memory=30)
    assert make_plan(config=PlanConfig(reader_gib=20)).readers == 3, "one a node, though there are 90 GiB"
    with pytest.raises(UserError, match="--plan.reader-gib 40: no node has so much memory for Ray's tasks, at most 30"):
        make_plan(config=PlanConfig(reader_gib=40, readers=1))


def test_gpus_are_left_alone_by_what_has_no_use_for_them(on):
    asked = on(CPU=64, GPU=1)
    plan = make_plan(8, config=PlanConfig(cpus=8, gpus=4, train_on="train"), on_gpus=False)
    assert (plan.workers, plan.gpus, plan.worker_resources) == (8, 0, {"CPU": 1.0})
    assert asked == [([{"CPU": 1}] * 8, 1200)] and make_plan(on_gpus=False).workers == 16


def test_what_is_reckoned_with_is_asked_for(on):
    asked = on(CPU=8, GPU=2, train=2)
    make_plan(config=PlanConfig(cpus=3, gpus=2, train_on="train", wait_minutes=1.5))
    assert asked == [([{"CPU": 1}] * 3 + [{"GPU": 1, "train": 1}] * 2, 90)]
    make_plan()
    assert asked[1][0] == []


def test_it_goes_on_without_what_has_not_come(on, capsys):
    on(CPU=8, missing="2 GPU")
    assert make_plan(config=PlanConfig(cpus=8, wait_minutes=5)).workers == 2
    assert capsys.readouterr().out == "warning: 2 GPU have not come within 5 minutes; going on without\n"


def test_gpus_that_never_come_are_an_error_and_fewer_are_not(on):
    on(CPU=8)
    with pytest.raises(UserError, match="--plan.gpus 4: the cluster has no GPU to train on; `ray status` says why"):
        make_plan(config=PlanConfig(gpus=4))
    on(CPU=8, GPU=3)
    assert make_plan(config=PlanConfig(gpus=4), batch_sizes={"--ctr.batch-size": 1024}).workers == 2


def test_a_negative_number_is_refused():
    with pytest.raises(UserError, match="plan.readers: -1 is under 0"):
        PlanConfig(readers=-1)


def test_the_plan_in_three_lines(on):
    on(CPU=48, GPU=4, train=4)
    assert make_plan(gpu_share=0.5, config=PlanConfig(train_on="train")).lines() == (
        "train    4 at once on 'train', 1 GPU and 1 CPUs each, 12 threads",
        "encode   8 at once, 0.5 GPU and 1 CPUs each",
        "read     48 at once, 0.5 GiB each",
    )


def test_a_real_cluster(ray_cluster):
    plan = make_plan(batch_sizes={"--ctr.batch-size": 1024})
    assert (plan.workers, plan.gpus, plan.readers) == (2, 0, 2)
