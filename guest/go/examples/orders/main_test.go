package main

import "testing"

func TestParseTakesWholeOrdersOnly(t *testing.T) {
	for payload, good := range map[string]bool{
		`{"id": "17", "item": "tea", "quantity": 2}`:  true,
		`{"id": "17", "item": "tea", "quantity": 2} `: true,
		``:     false,
		`null`: false,
		`[]`:   false,
		`{"id": "17", "item": "tea", "quantity": 2}{}`:                   false,
		`{"id": "17", "item": "tea", "quantity": 0}`:                     false,
		`{"id": "17", "item": "tea", "quantity": "2"}`:                   false,
		`{"id": "", "item": "tea", "quantity": 2}`:                       false,
		`{"id": "a/b", "item": "tea", "quantity": 2}`:                    false,
		`{"id": "17", "item": "", "quantity": 2}`:                        false,
		`{"id": "17", "item": "tea", "quantity": 2, "price": 1}`:         false,
		`{"id": "17", "item": "tea", "quantity": 2`:                      false,
		`{"id": "17", "item": "tea", "quantity": 999999999999999999999}`: false,
	} {
		if _, err := parse([]byte(payload)); (err == nil) != good {
			t.Errorf("%s: %v", payload, err)
		}
	}
}
