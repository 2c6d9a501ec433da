package fetchproxytest

import (
	"encoding/json"
	"fmt"
	"time"
	"unicode/utf8"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "fetchproxy/gen/fetchproxy/v1"
)

// queue is the consumer: it decides all, and waits for nothing. Its callers hold the mutex of the proxy.
type queue struct {
	maxDeliver uint32
	ackWait    time.Duration
	records    []*Record
	ready      []*Record         // To be delivered, in order.
	leases     map[string]*lease // All, by token.
	open       map[*lease]bool   // Those that are not over.
	unended    int               // The number of records that have not ended.
	delivered  uint64
	failing    []string // The reasons of the next settlements.
}

// lease is a delivery of a message.
type lease struct {
	record *Record
	token  string
	count  uint32
	number uint64 // On its stream.
	length time.Duration
	ends   time.Time
	isOver bool
	as     Kind // How it was settled. Empty: the lease has ended.
}

// terms are the terms of a caller.
type terms struct {
	codec    pb.Codec
	maxBytes uint32
	length   time.Duration
}

func (q *queue) publish(r *Record) {
	r.Sequence = uint64(len(q.records) + 1)
	q.records = append(q.records, r)
	q.unended++
	q.ready = append(q.ready, r)
}

// deliver leases the next message. A message that cannot be delivered as requested is rejected.
func (q *queue) deliver(now time.Time, t terms) (*lease, *pb.Delivery, *pb.Rejected) {
	r := q.ready[0]
	q.ready = q.ready[1:]
	r.attempts++
	q.delivered++
	l := &lease{
		record: r, count: r.attempts, length: t.length, ends: now.Add(t.length),
		token: fmt.Sprintf("fake-%d-%d", r.Sequence, r.attempts),
	}
	if wrong := wrongFor(t.codec, r); wrong != "" {
		r.settlements = append(r.settlements, Settlement{Kind: Term, Reason: wrong})
		q.endRecord(r)
		return nil, nil, &pb.Rejected{
			Cause: pb.RejectedCause_REJECTED_CAUSE_CODEC, Detail: wrong, Subject: r.subject,
			StreamSequence: r.Sequence, DeliveryCount: r.attempts, Size: uint64(len(r.payload)),
			Data: r.payload, Headers: r.headers,
		}
	}
	q.leases[l.token], q.open[l] = l, true
	delivery := q.again(now, l, t.codec)
	if t.maxBytes > 0 && proto.Size(delivery) > int(t.maxBytes) {
		return l, nil, &pb.Rejected{
			Cause: pb.RejectedCause_REJECTED_CAUSE_TOO_LARGE, Detail: "the message is larger than max_bytes",
			Subject: r.subject, StreamSequence: r.Sequence, DeliveryCount: r.attempts,
			Size: uint64(len(r.payload)), Token: l.token, Lease: delivery.Lease,
			LeaseExpireTime: delivery.LeaseExpireTime,
		}
	}
	return l, delivery, nil
}

// again returns the delivery of a lease.
func (q *queue) again(now time.Time, l *lease, codec pb.Codec) *pb.Delivery {
	r := l.record
	delivery := &pb.Delivery{
		Token: l.token, Subject: r.subject, Headers: r.headers, StreamSequence: r.Sequence,
		ConsumerSequence: q.delivered, DeliveryCount: l.count, MaxDeliver: q.maxDeliver,
		Pending: uint64(len(q.ready)), PublishTime: timestamppb.New(r.published),
		LeaseExpireTime: timestamppb.New(l.ends), Lease: durationpb.New(l.ends.Sub(now)), Number: l.number,
		Payload: &pb.Delivery_Data{Data: r.payload},
	}
	if codec == pb.Codec_CODEC_JSON || codec == pb.Codec_CODEC_TEXT {
		delivery.Payload = &pb.Delivery_Text{Text: string(r.payload)}
	}
	return delivery
}

// wrongFor returns why the payload fails the codec.
func wrongFor(codec pb.Codec, r *Record) string {
	for _, name := range []string{"Nats-Msg-Size", "Nats-Marker-Reason", "KV-Operation"} {
		if len(r.payload) == 0 && r.headers[name] != nil {
			return "" // A payload that was never delivered is not judged.
		}
	}
	switch {
	case codec == pb.Codec_CODEC_JSON && !(json.Valid(r.payload) && utf8.Valid(r.payload)):
		return "the payload is not JSON"
	case codec == pb.Codec_CODEC_TEXT && !utf8.Valid(r.payload):
		return "the payload is not UTF-8"
	}
	return ""
}

// settle carries out a settlement of a lease, which is nil if there is none.
func (q *queue) settle(now time.Time, l *lease, settlement *pb.Settlement) *pb.SettleResult {
	q.expire(now)
	done := actionOf(settlement)
	if len(q.failing) > 0 && done.Kind != "" {
		reason := q.failing[0]
		q.failing = q.failing[1:]
		return refusal(reason, "the test lets this settlement fail", nil)
	}
	switch {
	case l == nil:
		return refusal("TOKEN_INVALID", "this is not a token of the fake", nil)
	case l.isOver && l.as == "":
		return refusal("LEASE_EXPIRED", "the lease has ended", nil)
	case l.isOver && l.as == done.Kind:
		return &pb.SettleResult{Outcome: pb.Outcome_OUTCOME_DUPLICATE}
	case l.isOver:
		settled := map[Kind]string{Ack: "ACK", Nak: "NAK", Term: "TERM"}[l.as]
		return refusal("LEASE_SETTLED", "the message was settled before", map[string]string{"settled_as": settled})
	case done.Kind == "":
		length := l.length
		if lease := settlement.GetExtend().GetLease(); lease != nil {
			length = lease.AsDuration()
		}
		l.ends = now.Add(length)
		return &pb.SettleResult{
			Outcome: pb.Outcome_OUTCOME_EXTENDED, Lease: durationpb.New(length),
			LeaseExpireTime: timestamppb.New(l.ends),
		}
	}
	l.isOver, l.as = true, done.Kind
	delete(q.open, l)
	l.record.settlements = append(l.record.settlements, done)
	if done.Kind == Nak {
		q.comeBack(l.record)
	} else {
		q.endRecord(l.record)
	}
	return &pb.SettleResult{Outcome: pb.Outcome_OUTCOME_CONFIRMED}
}

// actionOf returns the settlement as it is recorded. An Extend has no kind.
func actionOf(settlement *pb.Settlement) Settlement {
	switch action := settlement.GetAction().(type) {
	case *pb.Settlement_Ack:
		return Settlement{Kind: Ack}
	case *pb.Settlement_Nak:
		return Settlement{Kind: Nak, Delay: action.Nak.GetDelay().AsDuration()}
	case *pb.Settlement_Term:
		return Settlement{Kind: Term, Reason: action.Term.GetReason()}
	}
	return Settlement{}
}

func refusal(reason, message string, metadata map[string]string) *pb.SettleResult {
	failed := &pb.SettleError{Reason: reason, Message: message, Metadata: metadata}
	if isRepeatable(reason) {
		failed.RetryDelay = durationpb.New(retryDelay)
	}
	return &pb.SettleResult{Error: failed}
}

// comeBack delivers a message again, unless its attempts are used up.
func (q *queue) comeBack(r *Record) {
	if q.maxDeliver > 0 && r.attempts >= q.maxDeliver {
		q.endRecord(r)
	} else {
		q.ready = append(q.ready, r)
	}
}

// expire ends all leases whose time is over.
func (q *queue) expire(now time.Time) {
	for l := range q.open {
		if !now.Before(l.ends) {
			q.end(l)
		}
	}
}

// end ends a lease that is not settled.
func (q *queue) end(l *lease) {
	if !l.isOver {
		l.isOver = true
		delete(q.open, l)
		q.comeBack(l.record)
	}
}

// next returns the time at which the next lease ends, or an hour from now.
func (q *queue) next(now time.Time) time.Time {
	next := now.Add(time.Hour)
	for l := range q.open {
		if l.ends.Before(next) {
			next = l.ends
		}
	}
	return next
}

func (q *queue) endRecord(r *Record) {
	r.hasEnded = true
	q.unended--
}

func (q *queue) haveAllEnded() bool { return q.unended == 0 }
