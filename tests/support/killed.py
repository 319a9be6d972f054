"""The command line, which kills itself when a file of so many lines is flushed: its last two arguments."""

KILLED = """
import os, signal, sys
from mmalign.cli.app import main
count, path, sync = int(sys.argv.pop()), sys.argv.pop(), os.fsync
def killing(file):
    if os.path.exists(path) and open(path).read().count(os.linesep) >= count:
        os.kill(os.getpid(), signal.SIGKILL)
    sync(file)
os.fsync = killing
main()
"""
