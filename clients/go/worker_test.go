package fetchproxy_test

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"fetchproxy"
	"fetchproxy/fetchproxytest"
)

// For what should happen at once.
const soon = 10 * time.Second

type task struct {
	Name string
	N    int
}

type handle = func(ctx context.Context, data task, message *fetchproxy.Message) error

// inEachMode runs a test with both loops.
func inEachMode(t *testing.T, test func(t *testing.T, mode fetchproxy.Mode)) {
	t.Helper()
	for name, mode := range map[string]fetchproxy.Mode{
		"Consume": fetchproxy.ModeConsume, "Fetch": fetchproxy.ModeFetch,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			test(t, mode)
		})
	}
}

// events collects the events of a worker.
type events struct {
	mutex sync.Mutex
	all   []fetchproxy.Event
	busy  atomic.Bool
	t     *testing.T
}

func (e *events) on(event fetchproxy.Event) {
	if e.busy.Swap(true) {
		e.t.Error("OnEvent is called by two goroutines at once")
	}
	defer e.busy.Store(false)
	e.mutex.Lock()
	defer e.mutex.Unlock()
	e.all = append(e.all, event)
}

// names returns the names of all events about a message, or about none with 0.
func (e *events) names(sequence uint64) (names []fetchproxy.EventName) {
	for _, event := range e.of(sequence) {
		names = append(names, event.Name)
	}
	return names
}

func (e *events) of(sequence uint64) (all []fetchproxy.Event) {
	e.mutex.Lock()
	defer e.mutex.Unlock()
	for _, event := range e.all {
		if event.Message == nil && sequence == 0 {
			all = append(all, event)
		}
		if event.Message != nil && event.Message.StreamSequence == sequence {
			all = append(all, event)
		}
	}
	return all
}

func (e *events) has(name fetchproxy.EventName) bool {
	e.mutex.Lock()
	defer e.mutex.Unlock()
	return slices.ContainsFunc(e.all, func(event fetchproxy.Event) bool { return event.Name == name })
}

func (e *events) check(sequence uint64, wanted ...fetchproxy.EventName) {
	e.t.Helper()
	if names := e.names(sequence); !slices.Equal(names, wanted) {
		e.t.Errorf("events of message %d: %v instead of %v", sequence, names, wanted)
	}
}

func newWorker(
	t *testing.T, proxy *fetchproxytest.Proxy, options fetchproxy.WorkerOptions, work handle,
) (*fetchproxy.Worker, *events) {
	t.Helper()
	events := &events{t: t}
	if options.OnEvent == nil {
		options.OnEvent = events.on
	}
	worker, err := fetchproxy.NewWorker(proxy.Client(), "TASKS", "batch", fetchproxy.JSON(work), options)
	if err != nil {
		t.Fatal(err)
	}
	return worker, events
}

// begin runs a worker while the test continues. The test must call the result.
func begin(t *testing.T, worker *fetchproxy.Worker) (wait func() error) {
	t.Helper()
	ended := make(chan error, 1)
	go func() { ended <- worker.Run(context.Background()) }()
	return func() error {
		t.Helper()
		select {
		case err := <-ended:
			return err
		case <-time.After(soon):
			t.Fatal("the worker does not end")
			return nil
		}
	}
}

func until(t *testing.T, what string, isSo func() bool) {
	t.Helper()
	for end := time.Now().Add(soon); !isSo(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not so in %v: %s", soon, what)
		}
	}
}

func settlements(t *testing.T, record *fetchproxytest.Record, wanted ...fetchproxytest.Settlement) {
	t.Helper()
	if got := record.Settlements(); !slices.Equal(got, wanted) {
		t.Errorf("message %d: %+v instead of %+v", record.Sequence, got, wanted)
	}
}

var (
	ack      = fetchproxytest.Settlement{Kind: fetchproxytest.Ack}
	giveBack = fetchproxytest.Settlement{Kind: fetchproxytest.Nak}
)

func nak(delay time.Duration) fetchproxytest.Settlement {
	return fetchproxytest.Settlement{Kind: fetchproxytest.Nak, Delay: delay}
}

func term(reason string) fetchproxytest.Settlement {
	return fetchproxytest.Settlement{Kind: fetchproxytest.Term, Reason: reason}
}

func TestResultOfAHandlerSettlesItsMessage(t *testing.T) {
	inEachMode(t, func(t *testing.T, mode fetchproxy.Mode) {
		proxy := fetchproxytest.New(t, fetchproxytest.Options{})
		done := proxy.PublishTo("a.b", map[string][]string{"Colour": {"red", "green"}}, task{"done", 7})
		later := proxy.Publish(task{Name: "later"})
		never := proxy.Publish(task{Name: "never"})
		longer := proxy.Publish(task{Name: "longer"})
		worker, events := newWorker(t, proxy, fetchproxy.WorkerOptions{Mode: mode},
			func(_ context.Context, data task, message *fetchproxy.Message) error {
				switch {
				case data.Name == "later" && message.DeliveryCount < 3:
					return fmt.Errorf("wrapped: %w", fetchproxy.Nak(time.Minute))
				case data.Name == "never":
					return fmt.Errorf("wrapped: %w", fetchproxy.Term("it is broken"))
				case data.Name == "longer" && message.DeliveryCount < 2:
					return fetchproxy.Nak(1e6 * time.Second)
				case data.Name == "done":
					headers := fmt.Sprint(message.Headers)
					if data.N != 7 || message.Subject != "a.b" || headers != "map[Colour:[red green]]" ||
						message.Stream != "TASKS" || message.Consumer != "batch" || message.Timestamp.IsZero() {
						t.Errorf("the message is not as published: %+v", message)
					}
				}
				return nil
			})
		proxy.Run(worker)
		settlements(t, done, ack)
		settlements(t, later, nak(time.Minute), nak(time.Minute), ack)
		settlements(t, never, term("it is broken"))
		settlements(t, longer, nak(fetchproxy.MaxDelay), ack)
		if later.Attempts() != 3 {
			t.Errorf("%d attempts instead of 3", later.Attempts())
		}
		events.check(0, "ready", "stopped")
		events.check(1, "acked")
		events.check(2, "nacked", "nacked", "acked")
		events.check(3, "termed")
	})
}

func TestErrorOfAHandlerIsANakWithADelayThatGrows(t *testing.T) {
	inEachMode(t, func(t *testing.T, mode fetchproxy.Mode) {
		proxy := fetchproxytest.New(t, fetchproxytest.Options{MaxDeliver: 9})
		record := proxy.Publish(task{})
		worker, events := newWorker(t, proxy, fetchproxy.WorkerOptions{Mode: mode},
			func(context.Context, task, *fetchproxy.Message) error { return errors.New("no database") })
		proxy.Run(worker)
		var wanted []fetchproxytest.Settlement
		for _, delay := range []int{5, 10, 20, 40, 80, 160, 300, 300, 300} {
			wanted = append(wanted, nak(time.Duration(delay)*time.Second))
		}
		settlements(t, record, wanted...)
		first := events.of(1)[0]
		if first.Name != fetchproxy.EventHandlerError || first.Err.Error() != "no database" {
			t.Errorf("the first event is %+v", first)
		}
	})
}

func TestPanicOfAHandlerIsAnErrorOfItsMessageAlone(t *testing.T) {
	inEachMode(t, func(t *testing.T, mode fetchproxy.Mode) {
		proxy := fetchproxytest.New(t, fetchproxytest.Options{})
		panics, exits, works := proxy.Publish(task{Name: "panic"}), proxy.Publish(task{Name: "exit"}), proxy.Publish(task{})
		worker, events := newWorker(t, proxy, fetchproxy.WorkerOptions{Mode: mode, Concurrency: 1},
			func(_ context.Context, data task, message *fetchproxy.Message) error {
				if message.DeliveryCount > 1 {
					return nil
				}
				switch data.Name {
				case "panic":
					var none map[string]int
					none["a"] = 1
				case "exit":
					runtime.Goexit()
				}
				return nil
			})
		proxy.Run(worker)
		settlements(t, panics, nak(5*time.Second), ack)
		settlements(t, exits, nak(5*time.Second), ack)
		settlements(t, works, ack)
		events.check(1, "handler_error", "nacked", "acked")
		if text := events.of(1)[0].Err.Error(); !strings.Contains(text, "nil map") || !strings.Contains(text, "worker_test.go") {
			t.Errorf("the error does not say where the handler panicked: %s", text)
		}
		events.check(2, "handler_error", "nacked", "acked")
	})
}

func TestPayloadThatCannotBeDecodedIsTerminated(t *testing.T) {
	inEachMode(t, func(t *testing.T, mode fetchproxy.Mode) {
		proxy := fetchproxytest.New(t, fetchproxytest.Options{})
		wrong, notJSON, good := proxy.Publish(`{"N": "seven"}`), proxy.Publish(`{"N": `), proxy.Publish(`{"N": 7}`)
		var handled atomic.Int32
		worker, events := newWorker(t, proxy, fetchproxy.WorkerOptions{Mode: mode},
			func(context.Context, task, *fetchproxy.Message) error { handled.Add(1); return nil })
		proxy.Run(worker)
		reason := wrong.Settlements()[0].Reason
		if !strings.HasPrefix(reason, "cannot be decoded: json: cannot unmarshal string") {
			t.Errorf("the reason of the Term is %q", reason)
		}
		settlements(t, notJSON, term("the payload is not JSON"))
		settlements(t, good, ack)
		events.check(1, "termed")
		events.check(2, "rejected")
		if handled.Load() != 1 {
			t.Errorf("%d messages were handled instead of 1", handled.Load())
		}
	})
}

func TestMessageThatIsTooLargeGoesToAnotherWorker(t *testing.T) {
	inEachMode(t, func(t *testing.T, mode fetchproxy.Mode) {
		proxy := fetchproxytest.New(t, fetchproxytest.Options{MaxDeliver: 1})
		large, small := proxy.Publish(task{Name: strings.Repeat("x", 4000)}), proxy.Publish(task{})
		worker, events := newWorker(t, proxy, fetchproxy.WorkerOptions{Mode: mode, MaxBytes: 2000},
			func(context.Context, task, *fetchproxy.Message) error { return nil })
		proxy.Run(worker)
		settlements(t, large, nak(time.Minute))
		settlements(t, small, ack)
		events.check(1, "rejected")
	})
}

func TestMessageWithoutAPayloadIsHandled(t *testing.T) {
	inEachMode(t, func(t *testing.T, mode fetchproxy.Mode) {
		proxy := fetchproxytest.New(t, fetchproxytest.Options{})
		record := proxy.PublishTo("key", map[string][]string{"KV-Operation": {"DEL"}}, "")
		worker, _ := newWorker(t, proxy, fetchproxy.WorkerOptions{Mode: mode},
			func(_ context.Context, data task, message *fetchproxy.Message) error {
				if !message.NoPayload() || data != (task{}) {
					t.Errorf("the data is %v, the payload %q", data, message.Payload)
				}
				return nil
			})
		proxy.Run(worker)
		settlements(t, record, ack)
	})
}

func TestOtherPayloadsAreDecodedByTheirHandlers(t *testing.T) {
	inEachMode(t, func(t *testing.T, mode fetchproxy.Mode) {
		data := make(chan any, 1)
		for _, handler := range []fetchproxy.Handler{
			fetchproxy.Text(func(_ context.Context, text string, _ *fetchproxy.Message) error { data <- text; return nil }),
			fetchproxy.Bytes(func(_ context.Context, bytes []byte, _ *fetchproxy.Message) error { data <- string(bytes); return nil }),
			fetchproxy.Decoded(
				func(payload []byte) (string, error) { return string(payload), nil },
				func(_ context.Context, text string, _ *fetchproxy.Message) error { data <- text; return nil }),
		} {
			proxy := fetchproxytest.New(t, fetchproxytest.Options{})
			proxy.Publish("not { JSON")
			worker, err := fetchproxy.NewWorker(proxy.Client(), "S", "C", handler, fetchproxy.WorkerOptions{Mode: mode})
			if err != nil {
				t.Fatal(err)
			}
			proxy.Run(worker)
			if got := <-data; got != "not { JSON" {
				t.Errorf("the data is %q", got)
			}
		}
	})
}

func TestConcurrencyIsTheMostHandlersAtOnce(t *testing.T) {
	inEachMode(t, func(t *testing.T, mode fetchproxy.Mode) {
		proxy := fetchproxytest.New(t, fetchproxytest.Options{})
		for range 50 {
			proxy.Publish(task{})
		}
		var running, most atomic.Int32
		worker, _ := newWorker(t, proxy, fetchproxy.WorkerOptions{Mode: mode, Concurrency: 4},
			func(context.Context, task, *fetchproxy.Message) error {
				most.Store(max(most.Load(), running.Add(1)))
				defer running.Add(-1)
				time.Sleep(time.Millisecond)
				return nil
			})
		proxy.Run(worker)
		if most.Load() > 4 || most.Load() < 2 {
			t.Errorf("%d handlers at once", most.Load())
		}
	})
}

func TestOptionOutOfRangeIsRefused(t *testing.T) {
	proxy := fetchproxytest.New(t, fetchproxytest.Options{})
	handler := fetchproxy.Bytes(func(context.Context, []byte, *fetchproxy.Message) error { return nil })
	for name, options := range map[string]fetchproxy.WorkerOptions{
		"Concurrency": {Concurrency: 1001},
		"Mode":        {Mode: 2},
		"Batch":       {Batch: -1},
		"MaxWait":     {MaxWait: time.Hour},
		"Lease":       {Lease: time.Millisecond},
		"Grace":       {Grace: time.Millisecond},
		"MaxBytes":    {MaxBytes: 1000},
		"AtMost":      {AtMost: time.Millisecond},
		"StopTimeout": {StopTimeout: -1},
		"Name":        {Name: strings.Repeat("x", 1025)},
	} {
		_, err := fetchproxy.NewWorker(proxy.Client(), "S", "C", handler, options)
		if err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%s out of range: %v", name, err)
		}
	}
	if _, err := fetchproxy.NewWorker(proxy.Client(), "", "C", handler, fetchproxy.WorkerOptions{}); err == nil {
		t.Error("a worker needs a stream")
	}
	if _, err := fetchproxy.NewWorker(proxy.Client(), "S", "C", fetchproxy.Handler{}, fetchproxy.WorkerOptions{}); err == nil {
		t.Error("a worker needs a handler")
	}
}

func TestHookThatPanicsDoesNotEndTheWorker(t *testing.T) {
	inEachMode(t, func(t *testing.T, mode fetchproxy.Mode) {
		proxy := fetchproxytest.New(t, fetchproxytest.Options{})
		record := proxy.Publish(task{})
		worker, _ := newWorker(t, proxy, fetchproxy.WorkerOptions{
			Mode: mode, OnEvent: func(fetchproxy.Event) { panic("a hook") },
		}, func(context.Context, task, *fetchproxy.Message) error { return nil })
		proxy.Run(worker)
		settlements(t, record, ack)
	})
}
