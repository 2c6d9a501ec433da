/** A worker for NATS JetStream over gRPC, through fetch-proxy. */
package io.fetchproxy.client;
