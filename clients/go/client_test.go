package fetchproxy_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	"fetchproxy"
	"fetchproxy/fetchproxytest"
	pb "fetchproxy/gen/fetchproxy/v1"
)

func fetchOne(t *testing.T, client *fetchproxy.Client) *fetchproxy.Message {
	t.Helper()
	batch, err := client.Fetch(t.Context(), "S", "C", fetchproxy.FetchOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if len(batch.Messages) != 1 {
		t.Fatalf("%d messages instead of 1", len(batch.Messages))
	}
	return batch.Messages[0]
}

func TestCallsSettleByToken(t *testing.T) {
	proxy := fetchproxytest.New(t, fetchproxytest.Options{})
	client := proxy.Client()
	first, second := proxy.Publish("1"), proxy.Publish("2")
	message := fetchOne(t, client)
	if lease, err := client.Extend(t.Context(), message.Token, time.Minute); err != nil || lease != time.Minute {
		t.Errorf("Extend: %v, %v", lease, err)
	}
	if lease, err := client.Extend(t.Context(), message.Token, 0); err != nil || lease != 30*time.Second {
		t.Errorf("Extend without a length: %v, %v", lease, err)
	}
	for _, wanted := range []fetchproxy.Outcome{pb.Outcome_OUTCOME_CONFIRMED, pb.Outcome_OUTCOME_DUPLICATE} {
		if outcome, err := client.Ack(t.Context(), message.Token); err != nil || outcome != wanted {
			t.Errorf("Ack: %v, %v", outcome, err)
		}
	}
	message = fetchOne(t, client)
	if _, err := client.Nak(t.Context(), message.Token, 1e6*time.Second); err != nil {
		t.Error(err)
	}
	message = fetchOne(t, client)
	if _, err := client.Term(t.Context(), message.Token, strings.Repeat("é", 600)); err != nil {
		t.Error(err)
	}
	settlements(t, first, ack)
	settlements(t, second, nak(fetchproxy.MaxDelay), term(strings.Repeat("é", 512)))
}

func TestSettleHasAResultForEachSettlement(t *testing.T) {
	proxy := fetchproxytest.New(t, fetchproxytest.Options{})
	record := proxy.Publish("1")
	message := fetchOne(t, proxy.Client())
	results, err := proxy.Client().Settle(t.Context(),
		fetchproxy.SettleExtend(message.Token, time.Millisecond),
		fetchproxy.SettleTerm(message.Token, "why"),
		fetchproxy.SettleAck(message.Token),
		fetchproxy.SettleNak("not a token", 0))
	if err != nil || len(results) != 4 {
		t.Fatalf("%v, %v", results, err)
	}
	if results[0].Err != nil || results[0].Lease != fetchproxy.MinLease {
		t.Errorf("Extend: %+v", results[0])
	}
	if results[1].Err != nil || results[1].Outcome != pb.Outcome_OUTCOME_CONFIRMED {
		t.Errorf("Term: %+v", results[1])
	}
	if failed := results[2].Err; failed == nil || failed.Reason != "LEASE_SETTLED" || failed.Metadata["settled_as"] != "TERM" {
		t.Errorf("Ack after Term: %+v", results[2])
	}
	if failed := results[3].Err; failed == nil || failed.Reason != "TOKEN_INVALID" {
		t.Errorf("another token: %+v", results[3])
	}
	settlements(t, record, term("why"))
}

func TestErrorHasTheReasonOfTheProxy(t *testing.T) {
	proxy := fetchproxytest.New(t, fetchproxytest.Options{})
	proxy.Fail("Fetch", "CONSUMER_NOT_FOUND")
	_, err := proxy.Client().Fetch(t.Context(), "S", "C", fetchproxy.FetchOptions{})
	var failed *fetchproxy.Error
	if !errors.As(err, &failed) || failed.Reason != "CONSUMER_NOT_FOUND" || failed.Code != codes.NotFound || failed.RetryDelay != 0 {
		t.Errorf("the error is %#v", err)
	}
}

func TestCallIsMadeFiveTimesAtMost(t *testing.T) {
	proxy := fetchproxytest.New(t, fetchproxytest.Options{})
	for range 6 {
		proxy.FailSettlement("LEASE_BUSY")
	}
	var failed *fetchproxy.Error
	if _, err := proxy.Client().Ack(t.Context(), "token"); !errors.As(err, &failed) || failed.Reason != "LEASE_BUSY" || failed.RetryDelay == 0 {
		t.Fatalf("the error is %v", err)
	}
	// The sixth failure is left for the first try of this call.
	_, err := proxy.Client().Ack(t.Context(), "token")
	if !errors.As(err, &failed) || failed.Reason != "TOKEN_INVALID" || failed.Code != codes.InvalidArgument {
		t.Errorf("the error is %v", err)
	}
}

func TestFetchThatBreaksIsRepeated(t *testing.T) {
	proxy := fetchproxytest.New(t, fetchproxytest.Options{})
	time.AfterFunc(20*time.Millisecond, func() {
		proxy.Disconnect()
		proxy.Publish("late")
	})
	if message := fetchOne(t, proxy.Client()); string(message.Payload) != "late" {
		t.Errorf("the payload is %q", message.Payload)
	}
}

func TestFetchWhoseAnswerIsLostHasTheSameMessages(t *testing.T) {
	proxy := fetchproxytest.New(t, fetchproxytest.Options{})
	proxy.Publish("1")
	proxy.LoseAnswer("Fetch")
	if message := fetchOne(t, proxy.Client()); message.DeliveryCount != 1 {
		t.Errorf("attempt %d instead of 1", message.DeliveryCount)
	}
}

func TestFetchThatIsCancelledIsGivenBack(t *testing.T) {
	proxy := fetchproxytest.New(t, fetchproxytest.Options{})
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(20*time.Millisecond, cancel)
	_, err := proxy.Client().Fetch(ctx, "S", "C", fetchproxy.FetchOptions{})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("the error is %v", err)
	}
	record := proxy.Publish("1")
	time.Sleep(20 * time.Millisecond)
	if record.Attempts() != 0 {
		t.Error("a Fetch that was cancelled has taken a message")
	}
}

func TestFetchOfAnEmptyStreamSaysWhyItIsEmpty(t *testing.T) {
	proxy := fetchproxytest.New(t, fetchproxytest.Options{})
	batch, err := proxy.Client().Fetch(t.Context(), "S", "C", fetchproxy.FetchOptions{MaxWait: -1})
	if err != nil || batch.EmptyReason != pb.EmptyReason_EMPTY_REASON_NO_MESSAGES {
		t.Errorf("%+v, %v", batch, err)
	}
}

func TestGiveBackReturnsTheMessagesOfAnAttempt(t *testing.T) {
	proxy := fetchproxytest.New(t, fetchproxytest.Options{})
	proxy.Publish("1")
	request := &pb.FetchRequest{Stream: "S", Consumer: "C", AttemptId: "one"}
	first, err := proxy.Client().Service().Fetch(t.Context(), request)
	if err != nil {
		t.Fatal(err)
	}
	again, err := proxy.Client().Service().Fetch(t.Context(), request)
	if err != nil || again.GetMessages()[0].GetToken() != first.GetMessages()[0].GetToken() {
		t.Errorf("the repeat has %v, %v", again, err)
	}
	if n, err := proxy.Client().GiveBack(t.Context(), "S", "C", "one"); err != nil || n != 1 {
		t.Errorf("GiveBack: %d, %v", n, err)
	}
	if message := fetchOne(t, proxy.Client()); message.DeliveryCount != 2 {
		t.Errorf("attempt %d instead of 2", message.DeliveryCount)
	}
}

func TestCredentialIsNotSentToAnotherMachineWithoutTLS(t *testing.T) {
	options := fetchproxy.ClientOptions{BearerFile: filepath.Join(t.TempDir(), "token")}
	for address, isRefused := range map[string]bool{
		"proxy.example:50051":         true,
		"dns:///proxy.example:50051":  true,
		"localhost.example:50051":     true,
		"https://proxy.example:50051": false,
		"127.0.0.1:50051":             false,
		"dns:///localhost:50051":      false,
		"[::1]:50051":                 false,
	} {
		client, err := fetchproxy.NewClient(address, options)
		if (err != nil) != isRefused {
			t.Errorf("%s: %v", address, err)
		}
		if err == nil {
			_ = client.Close()
		}
	}
}

func TestMissingFileIsRefusedWhenTheClientIsMade(t *testing.T) {
	none := filepath.Join(t.TempDir(), "none")
	empty := filepath.Join(t.TempDir(), "empty")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, options := range []fetchproxy.ClientOptions{{CA: none}, {CA: empty}, {Cert: none, Key: none}, {Cert: none}} {
		if _, err := fetchproxy.NewClient("https://localhost:1", options); err == nil {
			t.Errorf("%+v is accepted", options)
		}
	}
}

func TestEnvironmentNamesTheProxy(t *testing.T) {
	t.Setenv("FETCH_PROXY_ADDR", "proxy.example:50051")
	t.Setenv("FETCH_PROXY_BEARER_FILE", "token")
	if _, err := fetchproxy.NewClientFromEnv(); err == nil || !strings.Contains(err.Error(), "without TLS: use https://") {
		t.Errorf("the error is %v", err)
	}
}
