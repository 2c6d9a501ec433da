package fetchproxy

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"sync/atomic"
	"syscall"
	"time"
)

// Mode is how a worker takes messages.
type Mode int

const (
	// ModeConsume takes and settles messages on one stream. It costs least, and a worker that dies loses its
	// messages soon.
	ModeConsume Mode = iota
	// ModeFetch makes a call for each batch. It is for paths on which long calls end, and for even load on
	// replicas.
	ModeFetch
)

// WorkerOptions are the options of a worker. The zero value of each field is its default.
type WorkerOptions struct {
	// Concurrency is the most handlers at once: 1 to 1000. Default: 16.
	Concurrency int
	// Mode is ModeConsume by default.
	Mode Mode
	// Batch is the most messages that wait or are handled, in ModeFetch: 1 to 1000. Default: Concurrency.
	Batch int
	// MaxWait is the longest wait of a call for messages, in ModeFetch: up to 5 min. Default: 10 s.
	MaxWait time.Duration
	// Lease is the length of a lease, in ModeFetch: 1 s or more. The worker extends it again and again. Default:
	// the ack wait of the consumer.
	Lease time.Duration
	// Grace is the time after which the messages of a worker that dies come back, in ModeConsume: 1 s to 3 min.
	// Default: 10 s.
	Grace time.Duration
	// MaxBytes is the number of bytes of messages in hand from which no more are taken: 1 KiB to 64 MiB. A message
	// that is larger than MaxBytes or 16 MiB is rejected. Default: 16 MiB.
	MaxBytes int
	// AtMost is the longest time that a lease is kept for one handler: 1 s or more. The proxy lowers it to its own
	// longest lease. Default: 1 h.
	AtMost time.Duration
	// StopTimeout is how long handlers may continue after a stop. Default: until they end.
	StopTimeout time.Duration
	// OnEvent gets each event, in order, by one goroutine at a time. It must return soon. If it panics, the worker
	// logs that and continues. Default: [LogEvent].
	OnEvent func(Event)
	// Name is the name of the worker in the logs of the proxy, at most 1 KiB. Default: the name of the package.
	Name string
	// Tracer makes a span for each message: see the module fetchproxyotel. Default: none.
	Tracer Tracer
}

// Tracer makes a span around each handler.
type Tracer interface {
	// Start begins the span of a message. The handler gets the context. The function ends the span, with the error
	// of the handler or nil.
	Start(ctx context.Context, message *Message) (context.Context, func(error))
}

// withDefaults fills the options in, and refuses those out of range.
func (o WorkerOptions) withDefaults() (WorkerOptions, error) {
	o.Concurrency = cmp.Or(o.Concurrency, 16)
	o.Batch = cmp.Or(o.Batch, o.Concurrency)
	o.MaxWait = cmp.Or(o.MaxWait, defaultMaxWait)
	o.Grace = cmp.Or(o.Grace, 10*time.Second)
	o.MaxBytes = cmp.Or(o.MaxBytes, mostBytes)
	o.AtMost = cmp.Or(o.AtMost, time.Hour)
	o.Name = cmp.Or(o.Name, "fetchproxy-go/"+Version)
	if o.OnEvent == nil {
		o.OnEvent = LogEvent
	}
	return o, errors.Join(
		isWithin("Concurrency", o.Concurrency, 1, 1000),
		isWithin("Mode", o.Mode, ModeConsume, ModeFetch),
		isWithin("Batch", o.Batch, 1, 1000),
		isWithin("MaxWait", o.MaxWait, 0, 5*time.Minute),
		isWithin("Lease", cmp.Or(o.Lease, MinLease), MinLease, MaxDelay),
		isWithin("Grace", o.Grace, MinLease, 3*time.Minute),
		isWithin("MaxBytes", o.MaxBytes, 1<<10, 64<<20),
		isWithin("AtMost", o.AtMost, MinLease, MaxDelay),
		isWithin("StopTimeout", o.StopTimeout, 0, MaxDelay),
		isWithin("the length of Name", len(o.Name), 1, 1024),
	)
}

func isWithin[N cmp.Ordered](name string, value, least, most N) error {
	if value < least || value > most {
		return fmt.Errorf("fetchproxy: %s must be between %v and %v, not %v", name, least, most, value)
	}
	return nil
}

// Worker runs a handler for each message of a consumer.
type Worker struct {
	client           *Client
	stream, consumer string
	handler          Handler
	options          WorkerOptions
	hasRun           atomic.Bool

	// stop ends when no more messages are to be taken, hurry when handlers are to be cancelled.
	stop, hurry       context.Context
	endStop, endHurry context.CancelFunc
}

// NewWorker makes a worker. It refuses options that are out of range, and makes no call.
func NewWorker(
	client *Client, stream, consumer string, handler Handler, options WorkerOptions,
) (*Worker, error) {
	options, err := options.withDefaults()
	switch {
	case err != nil:
		return nil, err
	case stream == "" || consumer == "":
		return nil, errors.New("fetchproxy: a worker needs the names of a stream and of a consumer")
	case handler.handle == nil:
		return nil, errors.New("fetchproxy: a worker needs a handler: see JSON, Text, Bytes and Decoded")
	}
	w := &Worker{client: client, stream: stream, consumer: consumer, handler: handler, options: options}
	w.stop, w.endStop = context.WithCancel(context.Background())
	w.hurry, w.endHurry = context.WithCancel(context.Background())
	return w, nil
}

// Stop tells the worker to take no more messages. Messages that wait for a handler go back at once. Handlers that
// run come to their end, and are settled. Then Run returns. A second Stop cancels the handlers and gives their
// messages back. Stop does not wait.
func (w *Worker) Stop() {
	if w.stop.Err() != nil {
		w.endHurry()
	}
	w.endStop()
}

// Run works until Stop is called or ctx ends, and then returns nil. It returns an [*Error] if the proxy refuses
// the worker for a reason that a person must look at. All other failures are repeated. Handlers get the values of
// ctx, but not its end.
//
// A handler should return soon after its context has ended. Run does not wait for a handler whose lease is gone
// for more than 1 s. A worker runs once.
func (w *Worker) Run(ctx context.Context) error {
	if w.hasRun.Swap(true) {
		return errors.New("fetchproxy: a worker runs once")
	}
	defer w.endHurry()
	defer w.endStop()
	defer context.AfterFunc(ctx, w.endStop)()
	if timeout := w.options.StopTimeout; timeout > 0 {
		defer context.AfterFunc(w.stop, func() {
			sleep(w.hurry, timeout)
			w.endHurry()
		})()
	}
	h := newHand(context.WithoutCancel(ctx), w)
	h.tell(Event{Name: EventReady})
	var err error
	if w.options.Mode == ModeFetch {
		err = runFetch(h, w)
	} else {
		err = runConsume(h, w)
	}
	h.waitForHandlers()
	if err != nil {
		return err
	}
	h.tell(Event{Name: EventStopped})
	return nil
}

// RunUntilSignal is Run that also stops on SIGTERM or SIGINT. A second signal is a second Stop.
func (w *Worker) RunUntilSignal(ctx context.Context) error {
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, syscall.SIGTERM, os.Interrupt)
	defer signal.Stop(signals)
	ended := make(chan struct{})
	defer close(ended)
	go func() {
		for {
			select {
			case <-signals:
				w.Stop()
			case <-ended:
				return
			}
		}
	}()
	return w.Run(ctx)
}
