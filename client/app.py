"""Flower's ClientApp: records to a request, the answer back to records. All else is in client/answer.py."""

from __future__ import annotations

import logging

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client.answer import answer
from client.site import site_from
from common.messages import Hello, Query, Refusal, Train
from common.records import from_records, to_records

logging.getLogger("consilium").setLevel(logging.INFO)
app = ClientApp()


def _reply(message: Message, context: Context) -> Message:
    request = from_records(message.content)
    if isinstance(request, Hello | Query | Train):
        reply = answer(site_from(context.node_config), request)
    else:
        reply = Refusal("", f"{type(request).__name__} is not a request")
    return Message(content=to_records(reply), reply_to=message)


app.query()(_reply)
app.train()(_reply)
