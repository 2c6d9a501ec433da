/** Spans of OpenTelemetry. The package opentelemetry-api is an optional dependency. */
package io.fetchproxy.client.otel;
