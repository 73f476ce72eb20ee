from educe.cli.main import main

main()
