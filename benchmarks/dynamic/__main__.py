from benchmarks.dynamic.run import main

raise SystemExit(main())
