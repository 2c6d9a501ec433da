package fetchproxy

import (
	"log/slog"
	"time"
)

// EventName says what has happened.
type EventName string

// The events of a worker.
const (
	// EventReady: the worker begins.
	EventReady EventName = "ready"
	// EventAcked: the proxy has confirmed the Ack.
	EventAcked EventName = "acked"
	// EventNacked: the proxy has confirmed the Nak. Delay is set.
	EventNacked EventName = "nacked"
	// EventTermed: the proxy has confirmed the Term. Reason is set.
	EventTermed EventName = "termed"
	// EventReturned: a message was given back at a stop.
	EventReturned EventName = "returned"
	// EventRejected: a message cannot be delivered as requested. Rejected is set.
	EventRejected EventName = "rejected"
	// EventLost: the lease is lost, and the handler is cancelled. Reason, Detail and Err are set.
	EventLost EventName = "lost"
	// EventRetry: a call has failed and is repeated. Reason, Detail, Wait and Err are set.
	EventRetry EventName = "retry"
	// EventHandlerError: a handler has failed with an error of its own, or with a panic. Err and Delay are set.
	EventHandlerError EventName = "handler_error"
	// EventStopped: Run ends without an error.
	EventStopped EventName = "stopped"
)

// Event is something that has happened in a worker.
type Event struct {
	// Name says what has happened.
	Name EventName
	// Message is set for an event about a message, also if the message is rejected.
	Message *Message
	// Rejected is set if a message is rejected.
	Rejected *Rejected
	// Reason is the reason of a Term, of a loss, or of a repeat.
	Reason string
	// Detail is a text for people.
	Detail string
	// Delay is when a message comes back, after a Nak.
	Delay time.Duration
	// Wait is how long the worker waits before it repeats a call.
	Wait time.Duration
	// Err is the error behind the event, if there is one. It is an [*Error] of a loss or a repeat.
	Err error
}

// LogEvent logs the events that a person should see, as warnings of the standard logger. These are rejected,
// termed, lost, retry and handler_error. A worker without OnEvent calls it.
func LogEvent(event Event) {
	var fields []any
	if message := event.Message; message != nil {
		fields = append(fields, "stream", message.Stream, "consumer", message.Consumer,
			"sequence", message.StreamSequence, "delivery", message.DeliveryCount)
	}
	switch event.Name {
	case EventRejected, EventTermed, EventLost:
	case EventRetry:
		fields = append(fields, "wait", event.Wait)
	case EventHandlerError:
		fields = append(fields, "delay", event.Delay)
	default:
		return
	}
	for name, value := range map[string]string{"reason": event.Reason, "detail": event.Detail} {
		if value != "" {
			fields = append(fields, name, value)
		}
	}
	if event.Err != nil && event.Reason == "" {
		fields = append(fields, "error", event.Err)
	}
	slog.Warn("fetchproxy: "+string(event.Name), fields...)
}
