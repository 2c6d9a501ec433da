// Package fetchproxytest has a fake of fetch-proxy for unit tests. It speaks the contract in the memory of the
// test, so the real client and the real worker run with it.
package fetchproxytest

import (
	"context"
	"net"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/test/bufconn"

	"fetchproxy"
	pb "fetchproxy/gen/fetchproxy/v1"
)

// Options are the settings of the consumer.
type Options struct {
	// MaxDeliver is the number of attempts of a message. 0: no limit.
	MaxDeliver int
	// AckWait is the length of a lease for which a worker gives no length. 0 is 30 s.
	AckWait time.Duration
}

// Proxy is a fake of the proxy, with one stream and one consumer. It does not look at their names. It does not wait
// for the delay of a Nak: the message comes back at once, behind the others.
type Proxy struct {
	test   testing.TB
	client *fetchproxy.Client
	server *grpc.Server

	mutex    sync.Mutex // Guards the rest, and all records.
	queue    queue
	failing  map[string][]string // The reasons of the next calls, by method.
	losing   map[string]int      // How many answers are to be lost, by method.
	attempts map[string]*attempt
	changed  chan struct{} // Closed at the next change.
	broken   chan struct{} // Closed when all calls break.
}

// New starts a fake, which ends with the test.
func New(test testing.TB, options Options) *Proxy {
	test.Helper()
	if options.AckWait == 0 {
		options.AckWait = 30 * time.Second
	}
	p := &Proxy{
		test:   test,
		server: grpc.NewServer(),
		queue: queue{
			maxDeliver: uint32(options.MaxDeliver), ackWait: options.AckWait,
			leases: map[string]*lease{}, open: map[*lease]bool{},
		},
		failing:  map[string][]string{},
		losing:   map[string]int{},
		attempts: map[string]*attempt{},
		changed:  make(chan struct{}),
		broken:   make(chan struct{}),
	}
	pb.RegisterFetchServiceServer(p.server, &service{proxy: p})
	listener := bufconn.Listen(1 << 20)
	go func() { _ = p.server.Serve(listener) }()
	client, err := fetchproxy.NewClient("passthrough:///fake", fetchproxy.ClientOptions{
		DialOptions: []grpc.DialOption{
			grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
				return listener.DialContext(ctx)
			}),
		},
	})
	if err != nil {
		test.Fatal(err)
	}
	p.client = client
	test.Cleanup(func() {
		_ = client.Close()
		p.server.Stop()
	})
	return p
}

// Client returns a client of the fake. The end of the test closes it.
func (p *Proxy) Client() *fetchproxy.Client { return p.client }

// Address serves the fake at a free port of this machine, too, for the test of a whole program. It returns the value
// for FETCH_PROXY_ADDR.
func (p *Proxy) Address() string {
	p.test.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		p.test.Fatal(err)
	}
	go func() { _ = p.server.Serve(listener) }()
	return listener.Addr().String()
}

// Publish adds a message with the subject "test". The payload is bytes, text, or a value that becomes JSON.
func (p *Proxy) Publish(payload any) *Record { return p.PublishTo("test", nil, payload) }

// PublishTo adds a message with a subject and headers.
func (p *Proxy) PublishTo(subject string, headers map[string][]string, payload any) *Record {
	r := &Record{
		proxy: p, subject: subject, payload: bytesOf(payload), published: time.Now(),
		headers: map[string]*pb.HeaderValues{},
	}
	for name, values := range headers {
		r.headers[name] = &pb.HeaderValues{Values: values}
	}
	p.mutex.Lock()
	defer p.mutex.Unlock()
	p.queue.publish(r)
	p.change()
	return r
}

// Run runs the worker until each message has ended, then stops it. A worker that fails fails the test. Run also
// stops the worker when the test ends.
func (p *Proxy) Run(worker *fetchproxy.Worker) {
	p.test.Helper()
	ctx, cancel := context.WithCancel(p.test.Context())
	defer cancel()
	go func() {
		p.waitUntil(ctx, p.queue.haveAllEnded)
		cancel()
	}()
	if err := worker.Run(ctx); err != nil {
		p.test.Errorf("the worker has failed: %v", err)
	}
}

// Expire ends the lease of a message, as if another worker had it. It does nothing if the message is not leased.
func (p *Proxy) Expire(record *Record) {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	for l := range p.queue.open {
		if l.record == record {
			p.queue.end(l)
		}
	}
	p.change()
}

// Fail lets the next call of a method fail with a reason, such as Fail("Fetch", "NATS_UNAVAILABLE"). Several of them
// wait in line.
func (p *Proxy) Fail(method, reason string) {
	p.mustKnow(reason)
	p.mutex.Lock()
	defer p.mutex.Unlock()
	p.failing[method] = append(p.failing[method], reason)
}

// FailSettlement lets the next Ack, Nak or Term fail with a reason, in any call. Several of them wait in line.
func (p *Proxy) FailSettlement(reason string) {
	p.mustKnow(reason)
	p.mutex.Lock()
	defer p.mutex.Unlock()
	p.queue.failing = append(p.queue.failing, reason)
}

func (p *Proxy) mustKnow(reason string) {
	p.test.Helper()
	if _, isKnown := codeOf[reason]; !isKnown {
		p.test.Fatalf("fetchproxytest: %s is no reason of the proxy", reason)
	}
}

// LoseAnswer lets the next call of a method be carried out, and then break before its answer. An answer of "Settle"
// may also be lost on a stream, which then ends.
func (p *Proxy) LoseAnswer(method string) {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	p.losing[method]++
}

// Disconnect breaks all calls that are open, as a lost connection would.
func (p *Proxy) Disconnect() {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	close(p.broken)
	p.broken = make(chan struct{})
	p.change()
}

// Messages returns all records, in the order of the stream.
func (p *Proxy) Messages() []*Record {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	return append([]*Record(nil), p.queue.records...)
}

// waitUntil waits until the condition is true, and looks at each change of the fake. It returns early if ctx ends.
// The condition must not call the fake.
func (p *Proxy) waitUntil(ctx context.Context, condition func() bool) {
	for {
		p.mutex.Lock()
		p.queue.expire(time.Now())
		isTrue, changed, next := condition(), p.changed, p.queue.next(time.Now())
		p.mutex.Unlock()
		if isTrue {
			return
		}
		timer := time.NewTimer(time.Until(next))
		select {
		case <-changed:
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return
		}
		timer.Stop()
	}
}

// change wakes up all that wait. The mutex is held.
func (p *Proxy) change() {
	close(p.changed)
	p.changed = make(chan struct{})
}
