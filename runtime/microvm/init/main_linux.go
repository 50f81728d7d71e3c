package main

import "github.com/wasmatrix/wasmatrix/runtime/microvm/guest"

func isInit() bool { return guest.IsInit() }

func serve() { guest.Main() }
