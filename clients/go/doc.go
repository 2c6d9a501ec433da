// Package fetchproxy has a client and a worker for fetch-proxy, a gRPC service in front of NATS JetStream pull
// consumers.
//
// A [Worker] runs a handler for each message of a consumer. It keeps the lease of the message while the handler
// runs, and settles the message by the result of the handler. A [Client] makes single calls.
//
// The package fetchproxytest has a fake of the proxy for unit tests. The module fetchproxyotel has OpenTelemetry.
package fetchproxy

// Version is the version of the package, which is that of fetch-proxy.
const Version = "0.1.0"
