/** A proxy in memory, for unit tests of handlers. */
package io.fetchproxy.client.testing;
