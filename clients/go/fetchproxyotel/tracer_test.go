package fetchproxyotel_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"

	"go.opentelemetry.io/otel/codes"
	sdk "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"go.opentelemetry.io/otel/trace"

	"fetchproxy"
	"fetchproxy/fetchproxyotel"
	"fetchproxy/fetchproxytest"
)

const (
	parent     = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
	parentName = "0af7651916cd43dd8448eb211c80319c b7ad6b7169203331"
)

func TestHandlerHasASpanWithTheParentOfItsMessage(t *testing.T) {
	recorder := tracetest.NewSpanRecorder()
	provider := sdk.NewTracerProvider(sdk.WithSpanProcessor(recorder))
	proxy := fetchproxytest.New(t, fetchproxytest.Options{MaxDeliver: 1})
	proxy.PublishTo("a", map[string][]string{"Traceparent": {parent}, "tracestate": {"a=b"}}, "1")
	proxy.PublishTo("a", nil, "wrong")
	proxy.PublishTo("a", nil, "panic")
	handler := fetchproxy.Text(func(ctx context.Context, text string, _ *fetchproxy.Message) error {
		switch text {
		case "wrong":
			return errors.New("it is wrong")
		case "panic":
			panic("it is worse")
		}
		if !trace.SpanContextFromContext(ctx).IsValid() {
			t.Error("the context of the handler has no span")
		}
		return nil
	})
	worker, err := fetchproxy.NewWorker(proxy.Client(), "TASKS", "batch", handler, fetchproxy.WorkerOptions{
		Concurrency: 1, Tracer: fetchproxyotel.NewTracer(provider.Tracer("test")),
	})
	if err != nil {
		t.Fatal(err)
	}
	proxy.Run(worker)

	spans := recorder.Ended()
	if len(spans) != 3 {
		t.Fatalf("%d spans instead of 3", len(spans))
	}
	first := spans[0]
	if first.Name() != "process TASKS" || first.SpanKind() != trace.SpanKindConsumer {
		t.Errorf("the span is %s %v", first.Name(), first.SpanKind())
	}
	if name := fmt.Sprint(first.Parent().TraceID(), " ", first.Parent().SpanID()); name != parentName {
		t.Errorf("the parent is %s", name)
	}
	if state := first.Parent().TraceState().String(); state != "a=b" {
		t.Errorf("the state is %q", state)
	}
	var attributes []string
	for _, attribute := range first.Attributes() {
		attributes = append(attributes, string(attribute.Key)+"="+attribute.Value.Emit())
	}
	wanted := []string{
		"messaging.system=fetchproxy", "messaging.operation.type=process", "messaging.destination.name=TASKS",
		"messaging.consumer.group.name=batch", "messaging.message.id=1",
	}
	if !slices.Equal(attributes, wanted) {
		t.Errorf("the attributes are %v", attributes)
	}
	if first.Status().Code != codes.Unset {
		t.Errorf("the status is %v", first.Status())
	}
	if status := spans[1].Status(); status.Code != codes.Error || status.Description != "it is wrong" {
		t.Errorf("the status is %v", status)
	}
	if status := spans[2].Status(); status.Code != codes.Error {
		t.Errorf("the status after a panic is %v", status)
	}
	if spans[1].Parent().IsValid() {
		t.Error("a message without headers has no parent")
	}
}
