from leedl_fast.cli import main

main()
