"""What a served artifact needs to score raw ids, and the only code that is shipped with it: it imports nothing else of
this project, and of others only PyTorch, NumPy, pandas and pyarrow."""
