package fetchproxy

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	pb "fetchproxy/gen/fetchproxy/v1"
)

// NakError is the error of a handler that cannot do its work now: see [Nak].
type NakError struct {
	// Delay is how long JetStream waits before it delivers the message again.
	Delay time.Duration
}

// Error says when the message comes back.
func (e *NakError) Error() string { return fmt.Sprintf("not now, again in %v", e.Delay) }

// Nak returns an error for a handler that cannot do its work now. The message comes back after the delay, which
// is lowered to [MaxDelay]. The error may be wrapped.
func Nak(delay time.Duration) error { return &NakError{delay} }

// TermError is the error of a handler that can never do its work: see [Term].
type TermError struct {
	// Reason is for the advisory of JetStream.
	Reason string
}

// Error returns the reason.
func (e *TermError) Error() string { return e.Reason }

// Term returns an error for a handler that can never do its work. The message does not come back. The reason is
// for the advisory of JetStream, and is cut to [MaxReason]. The error may be wrapped.
func Term(reason string) error { return &TermError{reason} }

// Handler handles messages: see [JSON], [Text], [Bytes] and [Decoded].
//
// A handler that returns nil has done its work: Ack. [Nak] and [Term] are errors that choose another settlement.
// After any other error, or a panic, the message comes back after 5 s. The delay doubles with each attempt, up to
// 5 min.
//
// The context of a handler ends when the lease of its message is lost, because another worker may have the
// message then. [context.Cause] says why. The result of the handler is then dropped.
type Handler struct {
	codec  pb.Codec
	handle func(ctx context.Context, message *Message) error
}

// JSON makes a handler of messages whose payload is JSON. The proxy terminates a payload that is not JSON. A
// payload that is not a T is terminated here.
//
// Some messages were delivered without a payload: a tombstone of a key-value bucket, a delete marker, and all
// messages of a consumer of headers only. Their data is the zero T: see [Message.NoPayload].
func JSON[T any](handle func(ctx context.Context, data T, message *Message) error) Handler {
	decode := func(payload []byte) (data T, err error) {
		err = json.Unmarshal(payload, &data)
		return data, err
	}
	return Handler{pb.Codec_CODEC_JSON, decoded(decode, handle)}
}

// Text makes a handler of messages whose payload is UTF-8. The proxy terminates any other payload.
func Text(handle func(ctx context.Context, data string, message *Message) error) Handler {
	return Handler{pb.Codec_CODEC_TEXT, func(ctx context.Context, message *Message) error {
		return handle(ctx, string(message.Payload), message)
	}}
}

// Bytes makes a handler of messages with any payload.
func Bytes(handle func(ctx context.Context, data []byte, message *Message) error) Handler {
	return Handler{pb.Codec_CODEC_RAW, func(ctx context.Context, message *Message) error {
		return handle(ctx, message.Payload, message)
	}}
}

// Decoded makes a handler of messages whose payload is decoded by a function, such as one of Protobuf. If it
// returns an error, the message is terminated with that error as the reason. A message without a payload is not
// decoded, as with [JSON].
func Decoded[T any](
	decode func(payload []byte) (T, error),
	handle func(ctx context.Context, data T, message *Message) error,
) Handler {
	return Handler{pb.Codec_CODEC_RAW, decoded(decode, handle)}
}

func decoded[T any](
	decode func(payload []byte) (T, error),
	handle func(ctx context.Context, data T, message *Message) error,
) func(context.Context, *Message) error {
	return func(ctx context.Context, message *Message) error {
		var data T
		if !message.NoPayload() {
			var err error
			if data, err = decode(message.Payload); err != nil {
				return Term(fmt.Sprintf("cannot be decoded: %v", err))
			}
		}
		return handle(ctx, data, message)
	}
}
