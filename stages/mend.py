"""`python -m stages.mend`: mend dvc's list of who uses what, before dvc reads it, and say who is at work."""

from stages.lock_list import RWLOCK, at_work, mend

if __name__ == "__main__":
    if mend():
        print(f"{RWLOCK}: a killed dvc left it cut short; deleted")
    for each in at_work():
        print(each)
