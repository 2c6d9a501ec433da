package fetchproxy

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"slices"
	"sync"
	"time"

	pb "fetchproxy/gen/fetchproxy/v1"
)

const (
	// The delay of a Nak after an error of a handler, at the first attempt and at the most.
	firstDelay, longestDelay = 5 * time.Second, 5 * time.Minute
	// The delay of a Nak for a message that is too large for this worker.
	tooLargeDelay = time.Minute
	// How long settlements may take after a second stop.
	longestHurry = 5 * time.Second
	// How long Run waits for handlers that were cancelled.
	lastWait = time.Second
)

var errGoexit = errors.New("the handler has ended its goroutine")

// hand has the messages in hand of a running worker, with their handlers. The loop around it takes the messages
// and carries out what is decided.
type hand struct {
	worker *Worker
	values context.Context // Of the handlers.
	stop   context.Context // No more messages are taken.
	giveUp context.Context // What is not settled is lost.
	// For the loop, with the mutex held: an outcome was decided, and a handler has returned.
	decided  func(*lease)
	returned func()

	mutex   sync.Mutex // Guards the rest, and what changes of a lease.
	held    map[*lease]bool
	waiting []*lease // For a handler.
	running int      // Handlers that have not returned.
	bytes   int      // Of the messages in hand.
	idle    chan struct{}
	events  []Event // To be told.

	hook sync.Mutex // Held by the goroutine that tells events.
}

// lease is a message in hand, and the right to settle it until the lease ends.
type lease struct {
	*Message

	ctx     context.Context
	cancel  context.CancelCauseFunc
	size    int
	taken   time.Time
	begun   bool        // A handler has the message.
	outcome *Settlement // The outcome, once decided.
	event   Event       // To be told when it is settled.
	gone    bool        // It is settled or lost.
	ends    time.Time   // By the clock of this process. Zero: the proxy tells.

	// For the loop with Consume: the carrier of the settlement, and the name of the message on it. 0: the token.
	stream *stream
	number uint64
	// For the loop with Fetch: when to extend or settle it, and the number of failed calls in a row.
	next   time.Time
	failed int
}

func newHand(values context.Context, worker *Worker) *hand {
	giveUp, cancel := context.WithCancel(context.Background())
	context.AfterFunc(worker.hurry, func() { time.AfterFunc(longestHurry, cancel) })
	return &hand{
		worker: worker,
		values: values,
		stop:   worker.stop,
		giveUp: giveUp,
		held:   map[*lease]bool{},
		idle:   make(chan struct{}, 1),
	}
}

// watch returns the messages at a stop. Its result ends the watch.
func (h *hand) watch() (end func()) {
	endStop := context.AfterFunc(h.stop, func() {
		h.mutex.Lock()
		defer h.unlock()
		h.dispatch()
	})
	endHurry := context.AfterFunc(h.worker.hurry, func() {
		h.mutex.Lock()
		defer h.unlock()
		h.cancelAll()
	})
	endGiveUp := context.AfterFunc(h.giveUp, func() { h.loseAll(cancelled("the worker has stopped")) })
	return func() { endStop(); endHurry(); endGiveUp() }
}

// unlock releases the mutex, and tells the events. A loop holds no lock then, so the hook may take its time.
func (h *hand) unlock() {
	isSilent := len(h.events) == 0
	h.mutex.Unlock()
	if isSilent {
		return
	}
	h.hook.Lock()
	defer h.hook.Unlock()
	h.mutex.Lock()
	events := h.events
	h.events = nil
	h.mutex.Unlock()
	for _, event := range events {
		h.call(event)
	}
}

// call calls the hook of the user, whose panic must not end the process.
func (h *hand) call(event Event) {
	defer func() {
		if panicked := recover(); panicked != nil {
			slog.Warn("fetchproxy: OnEvent panicked", "event", event.Name, "panic", panicked)
		}
	}()
	h.worker.options.OnEvent(event)
}

func (h *hand) tell(event Event) {
	h.mutex.Lock()
	defer h.unlock()
	h.events = append(h.events, event)
}

// retry tells of a call that is repeated, and returns how long to wait before that.
func (h *hand) retry(failed *Error, times int) time.Duration {
	wait := failed.wait(times)
	h.tell(h.eventOfRetry(failed, wait))
	return wait
}

func (h *hand) eventOfRetry(failed *Error, wait time.Duration) Event {
	return Event{Name: EventRetry, Reason: failed.Reason, Detail: failed.Message, Wait: wait, Err: failed}
}

// isEmpty returns whether no message is in hand.
func (h *hand) isEmpty() bool {
	h.mutex.Lock()
	defer h.mutex.Unlock()
	return len(h.held) == 0
}

func (h *hand) isStopping() bool { return h.stop.Err() != nil }

// loseAll loses all messages in hand.
func (h *hand) loseAll(why *Error) {
	h.mutex.Lock()
	defer h.unlock()
	for l := range h.held {
		h.lose(l, why)
	}
}

// waitForHandlers waits for handlers that come to their end.
func (h *hand) waitForHandlers() {
	last := time.After(lastWait)
	for {
		h.mutex.Lock()
		running := h.running
		h.mutex.Unlock()
		if running == 0 {
			return
		}
		select {
		case <-h.idle:
		case <-last:
			return
		}
	}
}

// The callers of the following methods hold the mutex.

// hold takes a message in hand.
func (h *hand) hold(message *Message, size int) *lease {
	l := &lease{Message: message, size: size, taken: time.Now()}
	l.ctx, l.cancel = context.WithCancelCause(h.values)
	h.held[l] = true
	h.bytes += size
	return l
}

// handle gives the message to a handler when there is room for it.
func (h *hand) handle(l *lease) {
	h.waiting = append(h.waiting, l)
	h.dispatch()
}

// reject tells of a rejected message, and settles it if it is still leased to this worker.
func (h *hand) reject(rejected *Rejected) *lease {
	h.events = append(h.events, Event{
		Name: EventRejected, Message: rejected.Message, Rejected: rejected, Detail: rejected.Detail,
	})
	if rejected.Token == "" {
		return nil
	}
	l := h.hold(rejected.Message, 0)
	l.begun = true
	return l
}

// settleRejected decides the outcome of a rejected message. It has no event of its own.
func (h *hand) settleRejected(l *lease, rejected *Rejected) {
	if rejected.Cause == pb.RejectedCause_REJECTED_CAUSE_TOO_LARGE {
		h.decide(l, SettleNak("", tooLargeDelay), Event{}) // Another worker may accept larger answers.
	} else {
		h.decide(l, SettleTerm("", rejected.Detail), Event{})
	}
}

// dispatch starts handlers while there is room for them. At a stop, it gives back the messages that still wait.
func (h *hand) dispatch() {
	for len(h.waiting) > 0 && h.running < h.worker.options.Concurrency {
		l := h.waiting[0]
		h.waiting = h.waiting[1:]
		if !l.ends.IsZero() && time.Until(l.ends) <= 0 {
			h.lose(l, expired("it was over before a handler was free"))
			continue
		}
		l.begun = true
		h.running++
		go h.work(l)
	}
	if h.isStopping() {
		h.waiting = slices.DeleteFunc(h.waiting, h.giveBack)
	}
}

// giveBack returns a message that no handler has begun. A Nak of a last attempt would end the message, so it is left
// to a handler.
func (h *hand) giveBack(l *lease) bool {
	if l.LastAttempt() {
		return false
	}
	h.decide(l, SettleNak("", 0), Event{Name: EventReturned})
	return true
}

// cancelAll cancels the handlers, and gives their messages back. A last attempt is left to the end of its lease.
func (h *hand) cancelAll() {
	why := cancelled("the worker was told to stop at once")
	h.waiting = nil
	for l := range h.held {
		switch {
		case l.outcome != nil:
		case l.LastAttempt():
			h.lose(l, why)
		default:
			l.cancel(why)
			h.decide(l, SettleNak("", 0), Event{Name: EventReturned})
		}
	}
}

// decide sets the outcome of a message. The first one counts.
func (h *hand) decide(l *lease, outcome *Settlement, event Event) {
	if l.gone || l.outcome != nil {
		return
	}
	event.Message = l.Message
	l.outcome, l.event = outcome, event
	h.decided(l)
}

// settled tells of an outcome that the proxy has confirmed.
func (h *hand) settled(l *lease) { h.goes(l, l.event, nil) }

func (h *hand) lose(l *lease, why *Error) {
	h.goes(l, Event{
		Name: EventLost, Message: l.Message, Reason: why.Reason, Detail: why.Message, Err: why,
	}, why)
}

func (h *hand) goes(l *lease, event Event, why error) {
	if l.gone {
		return
	}
	l.gone = true
	l.cancel(why)
	delete(h.held, l)
	h.bytes -= l.size
	if !l.begun {
		h.waiting = slices.DeleteFunc(h.waiting, func(waits *lease) bool { return waits == l })
	}
	if event.Name != "" && (l.event.Name != "" || l.outcome == nil) {
		h.events = append(h.events, event)
	}
}

// work runs the handler of a message, and decides its outcome. It does so whatever the handler does.
func (h *hand) work(l *lease) {
	err := errGoexit
	defer func() {
		if panicked := recover(); panicked != nil {
			err = fmt.Errorf("panic: %v", panicked)
		}
		h.mutex.Lock()
		defer h.unlock()
		h.running--
		h.finish(l, err)
		h.dispatch()
		h.returned()
		signalTo(h.idle)
	}()
	err = h.run(l)
}

func (h *hand) run(l *lease) (err error) {
	ctx, end := l.ctx, func(error) {}
	if tracer := h.worker.options.Tracer; tracer != nil {
		ctx, end = tracer.Start(ctx, l.Message)
	}
	err = errGoexit
	defer func() {
		if panicked := recover(); panicked != nil {
			err = fmt.Errorf("panic: %v\n%s", panicked, debug.Stack())
		}
		end(err)
	}()
	return h.worker.handler.handle(ctx, l.Message)
}

// finish decides the outcome by the result of the handler. The mutex is held.
func (h *hand) finish(l *lease, err error) {
	if l.gone || l.outcome != nil {
		return // The lease is lost, or the message was given back.
	}
	var nak *NakError
	var term *TermError
	switch {
	case err == nil:
		h.decide(l, SettleAck(""), Event{Name: EventAcked})
	case errors.As(err, &nak):
		delay := max(0, min(nak.Delay, MaxDelay))
		h.decide(l, SettleNak("", delay), Event{Name: EventNacked, Delay: delay, Err: err})
	case errors.As(err, &term):
		h.decide(l, SettleTerm("", term.Reason), Event{Name: EventTermed, Reason: term.Reason, Err: err})
	default:
		delay := delayOf(l.DeliveryCount)
		h.events = append(h.events, Event{Name: EventHandlerError, Message: l.Message, Err: err, Delay: delay})
		h.decide(l, SettleNak("", delay), Event{Name: EventNacked, Delay: delay, Err: err})
	}
}

// delayOf returns the delay after an error of a handler: 5 s, doubled by each attempt.
func delayOf(attempt uint32) time.Duration {
	return min(firstDelay<<min(max(attempt, 1)-1, 10), longestDelay)
}

// signalTo wakes the receiver of a channel of one place.
func signalTo(wake chan struct{}) {
	select {
	case wake <- struct{}{}:
	default: // It wakes up anyway.
	}
}
