from tcsae.cli import main

main()
