//go:build !linux

package main

func isInit() bool { return false }

func serve() {}
