package fetchproxy

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// authority makes an authority in PEM, and a server with a certificate of it.
func authority(t *testing.T) (ca []byte, server *tls.Config) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test"}, DNSNames: []string{"localhost"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: true,
		BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	pair := tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		&tls.Config{Certificates: []tls.Certificate{pair}, NextProtos: []string{"h2"}}
}

func handshake(t *testing.T, files *files, server *tls.Config) error {
	t.Helper()
	listener, err := tls.Listen("tcp", "127.0.0.1:0", server)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = listener.Close() }()
	go func() {
		if conn, err := listener.Accept(); err == nil {
			defer func() { _ = conn.Close() }()
			_ = conn.(*tls.Conn).HandshakeContext(t.Context())
		}
	}()
	conn, err := net.Dial("tcp", listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	_, _, err = files.ClientHandshake(t.Context(), "localhost:1", conn)
	return err
}

func TestAuthoritiesAreReadAgainForEachConnection(t *testing.T) {
	oldCA, oldServer := authority(t)
	newCA, newServer := authority(t)
	file := filepath.Join(t.TempDir(), "ca.crt")
	files := &files{ca: file}
	for _, step := range []struct {
		ca      []byte
		server  *tls.Config
		isGood  bool
		promise string
	}{
		{oldCA, oldServer, true, "a proxy of the authority is trusted"},
		{oldCA, newServer, false, "a proxy of another authority is not trusted"},
		{newCA, newServer, true, "a proxy of the new authority in the file is trusted"},
		{newCA, oldServer, false, "a proxy of the old authority is not trusted any more"},
	} {
		if err := os.WriteFile(file, step.ca, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := handshake(t, files, step.server); (err == nil) != step.isGood {
			t.Errorf("%s: %v", step.promise, err)
		}
	}
}
