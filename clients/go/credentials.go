package fetchproxy

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"

	"google.golang.org/grpc/credentials"
)

// files names the credentials of a client. It is a transport that reads them again for each connection.
type files struct {
	ca, cert, key string
	serverName    string
}

func (f *files) transport() (credentials.TransportCredentials, error) {
	config := &tls.Config{ServerName: f.serverName, MinVersion: tls.VersionTLS12}
	if f.ca != "" {
		pem, err := os.ReadFile(f.ca)
		if err != nil {
			return nil, err
		}
		config.RootCAs = x509.NewCertPool()
		if !config.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("%s has no certificate in PEM", f.ca)
		}
	}
	if f.cert != "" {
		pair, err := tls.LoadX509KeyPair(f.cert, f.key)
		if err != nil {
			return nil, err
		}
		config.Certificates = []tls.Certificate{pair}
	}
	return credentials.NewTLS(config), nil
}

func (f *files) ClientHandshake(
	ctx context.Context, authority string, conn net.Conn,
) (net.Conn, credentials.AuthInfo, error) {
	transport, err := f.transport()
	if err != nil {
		return nil, nil, err
	}
	return transport.ClientHandshake(ctx, authority, conn)
}

func (f *files) ServerHandshake(net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, fmt.Errorf("these credentials are of a client")
}

func (f *files) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "tls", ServerName: f.serverName}
}

func (f *files) Clone() credentials.TransportCredentials {
	clone := *f
	return &clone
}

func (f *files) OverrideServerName(name string) error {
	f.serverName = name
	return nil
}

// bearer is the file of a token, which is read for each call.
type bearer string

func (b bearer) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	token, err := os.ReadFile(string(b))
	return map[string]string{"authorization": "Bearer " + strings.TrimSpace(string(token))}, err
}

// RequireTransportSecurity is false for the sake of this machine: see NewClient.
func (b bearer) RequireTransportSecurity() bool { return false }

// isHere returns whether the target is this machine.
func isHere(target string) bool {
	host := strings.TrimPrefix(target, "dns:///")
	isBegin := func(begin string) bool { return strings.HasPrefix(host, begin) }
	return slices.ContainsFunc([]string{"localhost:", "127.0.0.1:", "[::1]:"}, isBegin)
}
