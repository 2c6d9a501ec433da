package fetchproxy_test

import (
	"context"
	"log"
	"os"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"fetchproxy"
	"fetchproxy/fetchproxytest"
)

// Mail is the payload of the messages in README.md.
type Mail struct{ To, Text string }

var sent = make(chan Mail, 1)

func send(_ context.Context, mail Mail) error {
	sent <- mail
	return nil
}

// worker has the lines of README.md.
func worker() {
	client, err := fetchproxy.NewClientFromEnv()
	if err != nil {
		log.Fatal(err)
	}
	handler := fetchproxy.JSON(func(ctx context.Context, mail Mail, message *fetchproxy.Message) error {
		return send(ctx, mail)
	})
	worker, err := fetchproxy.NewWorker(client, "TASKS", "batch-worker", handler, fetchproxy.WorkerOptions{})
	if err != nil {
		log.Fatal(err)
	}
	if err := worker.RunUntilSignal(context.Background()); err != nil {
		log.Fatal(err)
	}
}

func TestLinesOfREADMEWork(t *testing.T) {
	proxy := fetchproxytest.New(t, fetchproxytest.Options{})
	record := proxy.Publish(Mail{"you", "hello"})
	t.Setenv("FETCH_PROXY_ADDR", proxy.Address())
	ended := make(chan struct{})
	go func() {
		worker()
		close(ended)
	}()
	if mail := <-sent; mail != (Mail{"you", "hello"}) {
		t.Errorf("the mail is %v", mail)
	}
	until(t, "the message is settled", record.HasEnded)
	// A signal is a stop.
	if err := syscall.Kill(os.Getpid(), syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	select {
	case <-ended:
	case <-time.After(soon):
		t.Fatal("the worker does not stop")
	}
	settlements(t, record, ack)
}

// This test has lines of README.md, too.
func TestMailIsSentAgain(t *testing.T) {
	busy := fetchproxy.JSON(func(_ context.Context, _ Mail, message *fetchproxy.Message) error {
		if message.DeliveryCount == 1 {
			return fetchproxy.Nak(time.Minute)
		}
		return nil
	})
	proxy := fetchproxytest.New(t, fetchproxytest.Options{MaxDeliver: 5})
	record := proxy.Publish(Mail{To: "you", Text: "hello"})
	worker, err := fetchproxy.NewWorker(proxy.Client(), "TASKS", "batch-worker", busy, fetchproxy.WorkerOptions{})
	if err != nil {
		t.Fatal(err)
	}
	proxy.Run(worker)
	if got := record.Settlements(); got[0].Delay != time.Minute || got[1].Kind != fetchproxytest.Ack {
		t.Errorf("the mail was settled by %v", got)
	}
}

func TestCodeOfREADMEIsTested(t *testing.T) {
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	tested, err := os.ReadFile("readme_test.go")
	if err != nil {
		t.Fatal(err)
	}
	flat := func(text string) string { return regexp.MustCompile(`(?m)^\s+`).ReplaceAllString(text, "") }
	blocks := regexp.MustCompile("(?s)```go\n(.*?)```").FindAllStringSubmatch(string(readme), -1)
	if len(blocks) < 2 {
		t.Fatalf("README.md has %d blocks of Go", len(blocks))
	}
	for _, block := range blocks {
		if !strings.Contains(flat(string(tested)), flat(block[1])) {
			t.Errorf("not tested:\n%s", block[1])
		}
	}
}
