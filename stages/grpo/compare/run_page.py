def print_runs(d):
    print(d)
