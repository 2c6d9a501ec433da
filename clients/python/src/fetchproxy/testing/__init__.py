"""A proxy in memory, for unit tests of handlers: the real client and the real worker run with it.

async with FakeProxy() as fake:
    message = fake.publish({"order": 7})
    await fake.run(Worker(fake.client, "ORDERS", "invoices", handle))
    assert message.settlements == [Settled("ack", attempt=1)]
"""

from fetchproxy.testing.fake import FakeProxy
from fetchproxy.testing.queue import Record, Settled

__all__ = ["FakeProxy", "Record", "Settled"]
