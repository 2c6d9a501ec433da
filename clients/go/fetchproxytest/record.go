package fetchproxytest

import (
	"encoding/json"
	"fmt"
	"slices"
	"time"

	pb "fetchproxy/gen/fetchproxy/v1"
)

// Kind is how a message was settled.
type Kind string

// The kinds of settlements.
const (
	Ack  Kind = "ack"
	Nak  Kind = "nak"
	Term Kind = "term"
)

// Settlement is a settlement that the fake has applied.
type Settlement struct {
	Kind Kind
	// Delay is the delay of a Nak. The fake does not wait for it.
	Delay time.Duration
	// Reason is the reason of a Term.
	Reason string
}

// Record is a message of the fake, and what became of it.
type Record struct {
	// Sequence is the number of the message in its stream, from 1.
	Sequence uint64

	proxy       *Proxy
	subject     string
	payload     []byte
	headers     map[string]*pb.HeaderValues
	published   time.Time
	attempts    uint32
	settlements []Settlement
	hasEnded    bool
}

// Attempts returns how often the message was delivered.
func (r *Record) Attempts() int {
	r.proxy.mutex.Lock()
	defer r.proxy.mutex.Unlock()
	return int(r.attempts)
}

// Settlements returns all settlements of the message, in order.
func (r *Record) Settlements() []Settlement {
	r.proxy.mutex.Lock()
	defer r.proxy.mutex.Unlock()
	return slices.Clone(r.settlements)
}

// HasEnded returns whether the message is not delivered again: after an Ack, a Term, or the end of its last
// attempt.
func (r *Record) HasEnded() bool {
	r.proxy.mutex.Lock()
	defer r.proxy.mutex.Unlock()
	return r.hasEnded
}

// bytesOf returns bytes and text as they are, and the JSON of anything else.
func bytesOf(payload any) []byte {
	switch payload := payload.(type) {
	case []byte:
		return payload
	case string:
		return []byte(payload)
	}
	text, err := json.Marshal(payload)
	if err != nil {
		panic(fmt.Sprintf("fetchproxytest: the payload has no JSON: %v", err))
	}
	return text
}
