// Package fetchproxyotel makes a span of OpenTelemetry for each message of a worker. It is a module of its own, so
// that the module fetchproxy needs no OpenTelemetry.
package fetchproxyotel

import (
	"context"
	"strconv"
	"strings"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"

	"fetchproxy"
)

// NewTracer returns a tracer for [fetchproxy.WorkerOptions]. A span "process STREAM" of the kind CONSUMER is around
// each handler. Its parent comes from the headers traceparent and tracestate of the message. An error of the handler
// is the status of the span.
func NewTracer(tracer trace.Tracer) fetchproxy.Tracer { return spans{tracer} }

type spans struct{ tracer trace.Tracer }

func (s spans) Start(ctx context.Context, message *fetchproxy.Message) (context.Context, func(error)) {
	ctx = propagation.TraceContext{}.Extract(ctx, carrier(message.Headers))
	ctx, span := s.tracer.Start(ctx, "process "+message.Stream,
		trace.WithSpanKind(trace.SpanKindConsumer),
		trace.WithAttributes(
			attribute.String("messaging.system", "fetchproxy"),
			attribute.String("messaging.operation.type", "process"),
			attribute.String("messaging.destination.name", message.Stream),
			attribute.String("messaging.consumer.group.name", message.Consumer),
			attribute.String("messaging.message.id", strconv.FormatUint(message.StreamSequence, 10)),
		))
	return ctx, func(err error) {
		if err != nil {
			span.RecordError(err)
			span.SetStatus(codes.Error, err.Error())
		}
		span.End()
	}
}

// carrier reads the headers of a message. Names of headers may be written with other upper and lower case.
type carrier map[string][]string

func (c carrier) Get(name string) string {
	for key, values := range c {
		if strings.EqualFold(key, name) && len(values) > 0 {
			return values[0]
		}
	}
	return ""
}

func (c carrier) Set(name, value string) { c[name] = []string{value} }

func (c carrier) Keys() (names []string) {
	for name := range c {
		names = append(names, name)
	}
	return names
}
