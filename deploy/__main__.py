"""`python -m utune_deploy.deploy`: the command line where nothing was installed."""

from .cli import main

main()
