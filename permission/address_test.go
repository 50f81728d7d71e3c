package permission

import (
	"net/netip"
	"testing"
)

func TestRulesThatNameAddresses(t *testing.T) {
	tests := []struct {
		rule, address, within string
		want                  bool
	}{
		{"http:domain:10.0.0.0/8", "10.1.2.3:80", "10.0.0.0/8", true},
		{"http:domain:10.1.0.0/16", "10.1.2.3:80", "10.0.0.0/8", true},
		{"http:domain:10.1.2.3", "10.1.2.3:80", "10.0.0.0/8", true},
		{"http:domain:10.1.2.3:80", "10.1.2.3:80", "10.0.0.0/8", true},
		{"http:domain:[fd00::1]", "[fd00::1]:80", "fc00::/7", true},
		{"http:domain:fd00::/8:80", "[fd00::1]:80", "fc00::/7", true},
		{"http:domain:10.1.2.3:81", "10.1.2.3:80", "10.0.0.0/8", false},
		{"http:domain:10.1.2.4", "10.1.2.3:80", "10.0.0.0/8", false},
		{"http:domain:0.0.0.0/0", "10.1.2.3:80", "10.0.0.0/8", false},
		{"http:domain:8.0.0.0/5", "10.1.2.3:80", "10.0.0.0/8", false},
		{"http:domain:169.254.0.0/16", "169.254.169.254:80", "169.254.169.254/32", false},
		{"http:domain:::/0", "[fd00::1]:80", "fc00::/7", false},
		{"http:domain:example.com", "10.1.2.3:80", "10.0.0.0/8", false},
		{"http:domain:*.example.com", "10.1.2.3:80", "10.0.0.0/8", false},
		{"http:request", "10.1.2.3:80", "10.0.0.0/8", false},
	}
	for _, tt := range tests {
		s, err := ParseSet([]string{"http:request", tt.rule})
		if err != nil {
			t.Fatal(err)
		}
		by, got := s.NamesAddress(Need{HTTP, Request, tt.address}, netip.MustParsePrefix(tt.within))
		if got != tt.want || got && by.String() != tt.rule {
			t.Errorf("%s names %s inside %s: %v by %q", tt.rule, tt.address, tt.within, got, by)
		}
	}
}

func TestRulesThatNameAHost(t *testing.T) {
	for rule, want := range map[string]bool{
		"http:domain:localhost": true, "http:domain:localhost:80": true, "http:domain:localhost:81": false,
		"http:domain:*.localhost": false, "http:domain:127.0.0.0/8": false, "http:request": false,
	} {
		s, err := ParseSet([]string{"http:request", rule})
		if err != nil {
			t.Fatal(err)
		}
		if by, got := s.NamesHost(Need{HTTP, Request, "localhost:80"}); got != want || got && by.String() != rule {
			t.Errorf("%s: %v by %q", rule, got, by)
		}
		if s.Narrowed() != (rule != "http:request") {
			t.Errorf("%s: narrowed %v", rule, s.Narrowed())
		}
	}
}

// A last label that some resolver takes for a number makes no host.
func TestHostsThatEndInANumber(t *testing.T) {
	for _, host := range []string{"0x7f", "a.0x", "a.0xff", "a.08", "1", "a.0b1", "0x7f000001", "a.99999999999999999999999"} {
		if _, err := Parse("http:domain:" + host); err == nil {
			t.Errorf("%s is a host", host)
		}
	}
	for _, host := range []string{"0x7f.example", "a.x1", "a.0xg", "1.a"} {
		if _, err := Parse("http:domain:" + host); err != nil {
			t.Error(err)
		}
	}
}
