package fetchproxy

import (
	"slices"
	"time"

	pb "fetchproxy/gen/fetchproxy/v1"
)

// Message is one attempt to deliver a message.
type Message struct {
	// Stream and Consumer are the names from which the message came.
	Stream, Consumer string
	// Subject is the subject under which the stream stores the message.
	Subject string
	// Payload is the payload as published. It is empty if nothing was delivered: see [Message.NoPayload].
	Payload []byte
	// Headers has all values of each header, in order. Names have the same upper and lower case as published.
	Headers map[string][]string
	// StreamSequence is the number of the message in its stream, from 1.
	StreamSequence uint64
	// DeliveryCount is the number of this attempt, from 1.
	DeliveryCount uint32
	// MaxDeliver is the number of attempts after which JetStream gives the message up. 0: never.
	MaxDeliver uint32
	// Timestamp is the time when the stream stored the message, by the clock of NATS.
	Timestamp time.Time
	// Token settles this delivery, by a call of one's own. A worker settles by itself.
	Token string
	// Lease is how long the message was leased, when it arrived.
	Lease time.Duration
}

// LastAttempt returns whether JetStream does not deliver the message again.
func (m *Message) LastAttempt() bool {
	return m.MaxDeliver > 0 && m.DeliveryCount >= m.MaxDeliver
}

// The headers of messages that are delivered without their payload.
var withoutPayload = []string{"Nats-Msg-Size", "Nats-Marker-Reason", "KV-Operation"}

// NoPayload returns whether the message was delivered without a payload. This is so for a tombstone of a key-value
// bucket, a delete marker, and any message of a consumer of headers only. Its headers say why.
func (m *Message) NoPayload() bool {
	isSet := func(name string) bool { return len(m.Headers[name]) > 0 }
	return len(m.Payload) == 0 && slices.ContainsFunc(withoutPayload, isSet)
}

// Rejected is a message that cannot be delivered as requested.
type Rejected struct {
	// Message has no payload if the payload is too large. It has a token if the message is still leased.
	*Message

	// Cause says why the message is rejected.
	Cause pb.RejectedCause
	// Detail is the exact fault, as text for people.
	Detail string
	// Size is the size of the payload in bytes.
	Size uint64
}

func newMessage(stream, consumer string, delivery *pb.Delivery) *Message {
	payload := delivery.GetData()
	if text := delivery.GetText(); text != "" {
		payload = []byte(text)
	}
	return &Message{
		Stream:         stream,
		Consumer:       consumer,
		Subject:        delivery.GetSubject(),
		Payload:        payload,
		Headers:        headers(delivery.GetHeaders()),
		StreamSequence: delivery.GetStreamSequence(),
		DeliveryCount:  delivery.GetDeliveryCount(),
		MaxDeliver:     delivery.GetMaxDeliver(),
		Timestamp:      delivery.GetPublishTime().AsTime(),
		Token:          delivery.GetToken(),
		Lease:          delivery.GetLease().AsDuration(),
	}
}

func newRejected(stream, consumer string, rejected *pb.Rejected) *Rejected {
	return &Rejected{
		Message: &Message{
			Stream:         stream,
			Consumer:       consumer,
			Subject:        rejected.GetSubject(),
			Payload:        rejected.GetData(),
			Headers:        headers(rejected.GetHeaders()),
			StreamSequence: rejected.GetStreamSequence(),
			DeliveryCount:  rejected.GetDeliveryCount(),
			Token:          rejected.GetToken(),
			Lease:          rejected.GetLease().AsDuration(),
		},
		Cause:  rejected.GetCause(),
		Detail: rejected.GetDetail(),
		Size:   rejected.GetSize(),
	}
}

func headers(published map[string]*pb.HeaderValues) map[string][]string {
	headers := make(map[string][]string, len(published))
	for name, values := range published {
		headers[name] = values.GetValues()
	}
	return headers
}
