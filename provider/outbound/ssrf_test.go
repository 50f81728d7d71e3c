package outbound

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"testing"

	"github.com/wasmatrix/wasmatrix/permission"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
	"github.com/wasmatrix/wasmatrix/provider"
)

// forbidden are addresses of every special kind.
var forbidden = []string{
	"127.0.0.1", "127.0.0.2", "10.0.0.1", "172.16.5.4", "172.31.255.254", "192.168.1.1", "169.254.169.254", "169.254.170.2",
	"100.64.0.1", "100.100.100.200", "168.63.129.16", "0.0.0.0", "0.1.2.3", "224.0.0.1", "255.255.255.255", "240.0.0.1",
	"198.18.0.1", "192.0.2.1", "198.51.100.7", "203.0.113.9", "192.0.0.192", "192.88.99.1",
}

var forbiddenV6 = []string{
	"::", "::1", "fd00:ec2::254", "fd12:3456::1", "fe80::1", "fec0::1", "ff02::1", "2001:db8::1", "3fff::1", "2001::1",
	"2001:0:53aa:64c:0:0:80ff:fffe", "2001:2::1", "64:ff9b:1::1", "100::1", "5f00::1", "4000::1", "8000::1", "::7f00:1",
}

// spellings are the ways in which the host of a URL can mean an IPv4 address to some
// reader of URLs, resolver or C library, and the IPv6 addresses that lead to it.
func spellings(text string) []string {
	addr := netip.MustParseAddr(text)
	b := addr.As4()
	n := binary.BigEndian.Uint32(b[:])
	low := uint32(b[2])<<8 | uint32(b[3])
	mid := uint32(b[1])<<16 | low
	wide := strings.Map(func(r rune) rune {
		if r >= '0' && r <= '9' {
			return r - '0' + '０'
		}
		return r
	}, text)
	hex := fmt.Sprintf("%x:%x", n>>16, n&0xffff)
	return []string{
		text, text + ".", wide, wide + "。",
		strings.ReplaceAll(text, ".", "。"), strings.ReplaceAll(text, ".", "．"), strings.ReplaceAll(text, ".", "｡"),
		strings.ReplaceAll(text, ".", "%2e"), "%" + fmt.Sprintf("%x", text[0]) + text[1:],
		fmt.Sprint(n), fmt.Sprintf("0x%x", n), fmt.Sprintf("0X%X", n), fmt.Sprintf("0%o", n), fmt.Sprintf("0x00000000%08x", n),
		fmt.Sprintf("0x%x.0x%x.0x%x.0x%x", b[0], b[1], b[2], b[3]),
		fmt.Sprintf("0%o.0%o.0%o.0%o", b[0], b[1], b[2], b[3]),
		fmt.Sprintf("0x%x.%d.0%o.%d", b[0], b[1], b[2], b[3]),
		fmt.Sprintf("%03d.%03d.%03d.%03d", b[0], b[1], b[2], b[3]),
		fmt.Sprintf("%d.%d.%d", b[0], b[1], low), fmt.Sprintf("%d.%d", b[0], mid), fmt.Sprintf("0x%x.%d", b[0], mid),
		"[::ffff:" + text + "]", "[::ffff:" + hex + "]", "[::" + text + "]", "[::ffff:0:" + text + "]",
		"[64:ff9b::" + text + "]", "[64:ff9b::" + hex + "]", "[64:ff9b:1::" + text + "]", "[2002:" + hex + "::1]",
		"[2001:0:" + hex + "::1]", "[0:0:0:0:0:FFFF:" + strings.ToUpper(hex) + "]",
	}
}

// tricks are URLs that say one host to one reader and another to the next.
func tricks(port string) []string {
	return []string{
		"http://allowed.example@127.0.0.1:" + port + "/", "http://allowed.example:80@127.0.0.1:" + port + "/",
		"http://allowed.example%40127.0.0.1:" + port + "/", "http://@127.0.0.1:" + port + "/", "http://:@127.0.0.1:" + port + "/",
		"http://allowed.example\\@127.0.0.1:" + port + "/", "http://127.0.0.1:" + port + "\\@allowed.example/",
		"http://allowed.example#@127.0.0.1:" + port + "\\", "http://allowed.example:80:" + port + "/",
		"http://127.0.0.1:" + port + "\t.allowed.example/", "http://127.0.0.1:" + port + "\n/", "http://127.0.0.1%00.allowed.example/",
		"http://127.0.0.1:" + port + " @allowed.example/", "http://[::1]allowed.example:" + port + "/", "http://[::1%25lo]:" + port + "/",
		"http://[::1%lo]:" + port + "/", "http://[fe80::1%25eth0]/", "http://[127.0.0.1]:" + port + "/", "http://[::1:" + port + "/",
		"http:127.0.0.1:" + port + "/", "http:/127.0.0.1:" + port + "/", "http:///127.0.0.1:" + port + "/", "//127.0.0.1:" + port + "/",
		"HTTP://LOCALHOST:" + port + "/", "http://localhost:" + port + "/", "http://localhost.:" + port + "/", "http://LocalHost/",
		"http://ⓛocalhost:" + port + "/", "http://①②⑦.⓪.⓪.①:" + port + "/", "http://127。0。0。1:" + port + "/", "http://xn--127-001/",
		"http://127.0.0.1..:" + port + "/", "http://.127.0.0.1:" + port + "/", "http://127.0.0.1:0" + port + "/", "http://127.1:" + port + "/",
		"http://0:" + port + "/", "http://0x:" + port + "/", "http://0x7f.1:" + port + "/", "http://0177.1:" + port + "/", "http://1e3.1/",
		"http://127.0.0.1:99999/", "http://127.0.0.1:-1/", "http://127.0.0.1:0/", "http://127.0.0.1:+80/", "http://127.0.0.1:8０/",
		"gopher://127.0.0.1:" + port + "/", "file:///etc/passwd", "ftp://127.0.0.1/", "unix:///run/docker.sock", "jar:http://127.0.0.1!/",
		"ws://127.0.0.1:" + port + "/", "http+unix://%2Frun%2Fdocker.sock/", "data:text/plain,x", "javascript:alert(1)", "about:blank",
		"", " ", "http://", "http://:" + port + "/", "https://?", "http://*/", "http://*.allowed.example/", "http://10.0.0.0/8/",
		"http://allowed.example.:80:80/", "http://allowed..example/", "http://-allowed.example/", "http://allowed.example%2f@127.0.0.1/",
	}
}

// wronglyNamed are hosts whose DNS answer is the attack, and hosts that look like
// one that is allowed.
func (w *world) wronglyNamed(port string) []string {
	var urls []string
	for i, a := range append(slices.Clone(forbidden), forbiddenV6...) {
		name := fmt.Sprintf("n%d.allowed.example", i)
		w.name(name, a)
		urls = append(urls, "http://"+name+":"+port+"/", "https://"+name+"/")
	}
	w.name("mapped.allowed.example", "::ffff:127.0.0.1")
	w.name("nat64.allowed.example", "64:ff9b::127.0.0.1")
	w.name("zoned.allowed.example", "fe80::1%lo")
	w.name("several.allowed.example", "10.0.0.1 127.0.0.1 ::1 fd00::1")
	for _, n := range []string{"mapped", "nat64", "zoned", "several", "SEVERAL", "unknown"} {
		urls = append(urls, "http://"+n+".allowed.example:"+port+"/", "http://"+n+".allowed.example.:"+port+"/")
	}
	return urls
}

func attacks(w *world) []string {
	port := w.trap.port
	var urls []string
	for _, a := range forbidden {
		for _, s := range spellings(a) {
			urls = append(urls, "http://"+s+":"+port+"/")
		}
	}
	for _, a := range forbiddenV6 {
		addr := netip.MustParseAddr(a)
		urls = append(urls, "http://["+a+"]:"+port+"/", "https://["+addr.StringExpanded()+"]:"+port+"/", "http://["+strings.ToUpper(a)+"]/")
	}
	urls = append(urls, tricks(port)...)
	urls = append(urls, w.wronglyNamed(port)...)
	slices.Sort(urls)
	return slices.Compact(urls)
}

// attackers are callers to whom no special address was opened.
func attackers(t testing.TB) map[string]permission.Set {
	return map[string]permission.Set{
		"any host":   permissions(t, "http:request"),
		"some hosts": permissions(t, "http:request", "http:domain:allowed.example", "http:domain:*.allowed.example"),
		"all ranges": permissions(t, "http:request", "http:domain:0.0.0.0/0", "http:domain:::/0", "http:domain:*.allowed.example"),
		"other port": permissions(t, "http:request", "http:domain:127.0.0.1:1", "http:domain:10.0.0.0/8:1",
			"http:domain:[::1]:1", "http:domain:*.allowed.example"),
		"no request": permissions(t, "http:domain:127.0.0.0/8", "http:domain:allowed.example"),
		"nothing":    {},
	}
}

// refusedWell reports whether an attack ended as it must: by a refusal, or because
// the name does not exist.
func refusedWell(err error) bool {
	return errors.Is(err, provider.ErrDenied) || errors.Is(err, provider.ErrInvalid) ||
		errors.Is(err, provider.ErrCommunication) && strings.Contains(err.Error(), "cannot be resolved")
}

func TestNoURLReachesAForbiddenAddress(t *testing.T) {
	w := newWorld(t, http.NotFoundHandler())
	p := w.open(nil)
	urls := attacks(w)
	if len(urls) < 300 {
		t.Fatalf("only %d URLs", len(urls))
	}
	for who, set := range attackers(t) {
		for _, u := range urls {
			if resp, err := do(t.Context(), t, p, set, &pb.HttpRequest{Url: u}); !refusedWell(err) {
				t.Errorf("%s: %q: %v, %v", who, u, resp.GetStatus(), err)
			}
		}
	}
	for _, u := range urls {
		_, err := p.Invoke(t.Context(), provider.Call{
			Name: "root", Operation: opRequest, Payload: encode(t, &pb.HttpRequest{Method: "GET", Url: u}),
		})
		if !refusedWell(err) {
			t.Errorf("a user: %q: %v", u, err)
		}
	}
	if n := w.trap.entered.Load(); n != 0 || len(w.dialled) != 0 {
		t.Errorf("the trap was entered %d times; dialled %v", n, w.dialled)
	}
	t.Logf("%d distinct URLs, %d kinds of caller", len(urls), len(attackers(t))+1)
}

// TestNoRedirectReachesAForbiddenAddress sends every attack as the Location of an
// answer of a host that is allowed.
func TestNoRedirectReachesAForbiddenAddress(t *testing.T) {
	w := newWorld(t, http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		status, redirects := map[string]int{"/301": 301, "/302": 302, "/303": 303, "/307": 307, "/308": 308}[r.URL.Path]
		if !redirects {
			return // a reference that was relative after all
		}
		rw.Header()["Location"] = []string{r.URL.Query().Get("to")}
		rw.WriteHeader(status)
	}))
	w.name("allowed.example", publicV4)
	p := w.open(nil)
	set := permissions(t, "http:request", "http:domain:allowed.example:80", "http:domain:*.allowed.example")
	open := permissions(t, "http:request")
	targets := attacks(w)
	targets = append(targets, "//127.0.0.1:"+w.trap.port+"/", "///127.0.0.1/", "/\\127.0.0.1:"+w.trap.port+"/", "\\\\127.0.0.1\\",
		"//allowed.example@127.0.0.1:"+w.trap.port, "http://allowed.example:"+w.trap.port+"@127.0.0.1/", "//[::1]:"+w.trap.port+"/x")
	followed := 0
	for i, to := range targets {
		if to == "" || strings.ContainsAny(to, "\n\t ") || strings.TrimSpace(to) == "" {
			continue // no header field can hold it
		}
		status := []string{"301", "302", "303", "307", "308"}[i%5]
		first := "http://allowed.example/" + status + "?to=" + url.QueryEscape(to)
		who := set
		if i%2 == 1 {
			who = open
		}
		resp, err := do(t.Context(), t, p, who, &pb.HttpRequest{Method: "POST", Url: first, Body: []byte("x")})
		// A few of them are paths of allowed.example when read as a relative reference.
		relative := err == nil && strings.HasPrefix(resp.GetUrl(), "http://allowed.example/")
		if !refusedWell(err) && !relative {
			t.Errorf("redirect %s to %q: %v, %v", status, to, resp, err)
		}
		followed++
	}
	for _, d := range w.dialled {
		if d != publicV4+":80" {
			t.Errorf("dialled %s", d)
		}
	}
	if n := w.trap.entered.Load(); n != 0 || followed < 300 {
		t.Errorf("the trap was entered %d times in %d redirects", n, followed)
	}
}

// TestTheDNSCannotRebind lets a name be public when it is checked first and private
// from then on, and puts private addresses beside public ones.
func TestTheDNSCannotRebind(t *testing.T) {
	w := newWorld(t, http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		rw.Header().Set("Connection", "close")
		if r.URL.Path == "/back" {
			http.Redirect(rw, r, "/again", http.StatusFound)
		}
	}))
	p := w.open(nil)
	set := permissions(t, "http:request", "http:domain:*.example:80")
	for i, private := range []string{"127.0.0.1", "10.0.0.1", "::1", "169.254.169.254", "::ffff:192.168.0.1", "fd00:ec2::254"} {
		name := fmt.Sprintf("rebind%d.example", i)
		w.name(name, publicV4, private)
		if resp, err := do(t.Context(), t, p, set, &pb.HttpRequest{Url: "http://" + name + "/"}); err != nil || resp.GetStatus() != 200 {
			t.Errorf("%s, while public: %v, %v", name, resp.GetStatus(), err)
		}
		_, err := do(t.Context(), t, p, set, &pb.HttpRequest{Url: "http://" + name + "/"})
		wantRefusal(t, err, provider.ErrDenied, netip.MustParseAddr(private).Unmap().String(), "wasmatrix grant hello")

		hop := fmt.Sprintf("hop%d.example", i)
		w.name(hop, publicV4, private)
		_, err = do(t.Context(), t, p, set, &pb.HttpRequest{Url: "http://" + hop + "/back"})
		wantRefusal(t, err, provider.ErrDenied, "no http:domain rule names it", "--provider web")

		mixed := fmt.Sprintf("mixed%d.example", i)
		w.name(mixed, private+" "+publicV4+" "+private)
		if _, err := do(t.Context(), t, p, set, &pb.HttpRequest{Url: "http://" + mixed + "/"}); err != nil {
			t.Errorf("%s: %v", mixed, err)
		}
	}
	for _, d := range w.dialled {
		if d != publicV4+":80" {
			t.Errorf("dialled %s", d)
		}
	}
	if n := w.trap.entered.Load(); n != 0 {
		t.Errorf("the trap was entered %d times", n)
	}
}

// TestWhatIsAllowedWorks is the other side: the same tricks and addresses, where a
// rule opens them, get an answer.
func TestWhatIsAllowedWorks(t *testing.T) {
	w := newWorld(t, http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) { _, _ = rw.Write([]byte(r.Host)) }))
	p := w.open(nil)
	w.name("allowed.example", publicV4)
	w.name("www.allowed.example", publicV6)
	w.name("both.allowed.example", publicV6+" "+publicV4)
	w.name("mapped.allowed.example", "::ffff:"+publicV4) // as Go's resolver writes what a hosts file holds
	w.name("inside.allowed.example", "10.1.2.3")
	w.name("home.allowed.example", "127.0.0.1")
	w.name("localhost", "127.0.0.1")
	w.name("xn--bcher-kva.example", publicV4)
	w.name("under_score.example", publicV4)
	w.name("r3---sn.example", publicV4)
	port := w.trap.port
	var v6 []string
	if c, err := w.dial(t.Context(), "tcp", "[::1]:"+port); err == nil {
		_ = c.Close()
		v6 = []string{"http://[::1]:" + port + "/", "http://[0:0:0:0:0:0:0:1]:" + port + "/"}
	}
	w.trap.entered.Store(0)
	tests := []struct {
		set  []string
		urls []string
		host string // what the server is to see; "" is the trap's answer
	}{
		{nil, []string{
			"http://allowed.example", "http://allowed.example/", "HTTP://ALLOWED.example:80/a?b=c#d", "http://allowed.example.",
			"http://ａｌｌｏｗｅｄ.example/", "http://allowed。example/", "http://allowed.example:0080/", "http://allowed.example:/",
		}, "allowed.example"},
		{nil, []string{"http://allowed.example:8080/"}, "allowed.example:8080"},
		{nil, []string{"http://bücher.example/", "http://BÜCHER.example./", "http://xn--bcher-kva.example/"}, "xn--bcher-kva.example"},
		{nil, []string{"http://under_score.example/"}, "under_score.example"},
		{nil, []string{"http://r3---sn.example/"}, "r3---sn.example"},
		{nil, []string{"http://" + publicV4 + "/", "http://９３.184.216.34/", "http://93.184.216.34./"}, publicV4},
		{nil, []string{"http://[" + publicV6 + "]/"}, "[" + publicV6 + "]"},
		{[]string{"http:domain:*.allowed.example"}, []string{"http://www.allowed.example/"}, "www.allowed.example"},
		{[]string{"http:domain:*.allowed.example:80"}, []string{"http://both.allowed.example/"}, "both.allowed.example"},
		{[]string{"http:domain:*.allowed.example"}, []string{"http://mapped.allowed.example/"}, "mapped.allowed.example"},
		{[]string{"http:domain:93.184.0.0/16"}, []string{"http://" + publicV4 + "/"}, publicV4},
		{[]string{"http:domain:0.0.0.0/0"}, []string{"http://" + publicV4 + "/"}, publicV4},
		{[]string{"http:domain:127.0.0.0/8"}, []string{
			"http://127.0.0.1:" + port + "/", "http://127.0.0.2:" + port + "/", "http://127.0.0.1.:" + port + "/", "http://１２７.0.0.1:" + port + "/",
		}, ""},
		{[]string{"http:domain:127.0.0.1:" + port}, []string{"http://127.0.0.1:" + port + "/"}, ""},
		{[]string{"http:domain:localhost"}, []string{"http://localhost:" + port + "/", "http://LOCALHOST.:" + port + "/"}, ""},
		{[]string{"http:domain:*.allowed.example", "http:domain:10.0.0.0/8"}, []string{"http://inside.allowed.example:" + port + "/"}, ""},
		{[]string{"http:domain:*.allowed.example", "http:domain:127.0.0.1:" + port}, []string{"http://home.allowed.example:" + port + "/"}, ""},
		{[]string{"http:domain:169.254.169.254"}, []string{"http://169.254.169.254:" + port + "/latest/"}, ""},
		{[]string{"http:domain:[::1]"}, v6, ""},
		{[]string{"http:domain:64:ff9b::/96"}, []string{"http://[64:ff9b::5db8:d822]:" + port + "/"}, ""},
		{[]string{"http:domain:fd00::/8:" + port}, []string{"http://[fd00::1]:" + port + "/"}, ""},
	}
	for _, tt := range tests {
		set := permissions(t, append([]string{"http:request"}, tt.set...)...)
		for _, u := range tt.urls {
			resp, err := do(t.Context(), t, p, set, &pb.HttpRequest{Url: u})
			want := tt.host
			if want == "" {
				want = "trap"
			}
			if err != nil || resp.GetStatus() != 200 || string(resp.GetBody()) != want {
				t.Errorf("%v: %s: %d %q, %v; want %q", tt.set, u, resp.GetStatus(), resp.GetBody(), err, want)
			}
		}
	}
}

// TestNarrowRules are rules that come close to opening an address and do not.
func TestNarrowRules(t *testing.T) {
	w := newWorld(t, http.NotFoundHandler())
	p := w.open(nil)
	w.name("inside.example", "10.1.2.3")
	w.name("meta.example", "169.254.169.254")
	w.name("localhost", "10.0.0.1")
	w.name("tunnel.example", "64:ff9b::7f00:1")
	w.name("six.example", "2002:7f00:1::1")
	tests := []struct {
		set []string
		url string
	}{
		{[]string{"http:domain:inside.example"}, "http://inside.example/"},
		{[]string{"http:domain:inside.example", "http:domain:10.1.2.4"}, "http://inside.example/"},
		{[]string{"http:domain:inside.example", "http:domain:10.0.0.0/8:81"}, "http://inside.example/"},
		{[]string{"http:domain:inside.example", "http:domain:0.0.0.0/0"}, "http://inside.example/"},
		{[]string{"http:domain:10.0.0.0/8"}, "http://inside.example/"},
		{[]string{"http:domain:meta.example", "http:domain:169.254.0.0/16"}, "http://meta.example/"},
		{[]string{"http:domain:localhost"}, "http://localhost/"},
		{[]string{"http:domain:*.example", "http:domain:64:ff9b::/96"}, "http://tunnel.example/"},
		{[]string{"http:domain:*.example", "http:domain:2002::/16"}, "http://six.example/"},
		{[]string{"http:domain:*.example", "http:domain:127.0.0.1"}, "http://tunnel.example/"},
	}
	for _, tt := range tests {
		_, err := do(t.Context(), t, p, permissions(t, append([]string{"http:request"}, tt.set...)...), &pb.HttpRequest{Url: tt.url})
		if !errors.Is(err, provider.ErrDenied) {
			t.Errorf("%v: %s: %v", tt.set, tt.url, err)
		}
	}
	if n := w.trap.entered.Load(); n != 0 {
		t.Errorf("the trap was entered %d times", n)
	}
}
