"""Flower's ClientApp: records to a request, the answer back to records. All else is in client/answer.py."""

from __future__ import annotations

import logging
import os

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client.answer import answer
from client.site import site_from
from common.errors import ConsiliumError
from common.logs import set_up
from common.messages import Refusal, Reply, Request
from common.records import from_records, to_records

log = logging.getLogger("consilium.centre")
app = ClientApp()
if os.environ.get("CONSILIUM_LOG"):  # in a simulation only what is wrong is said
    set_up()


def _reply(message: Message, context: Context) -> Message:
    request = from_records(message.content)
    reply: Reply
    if not isinstance(request, Request):
        reply = Refusal("", f"{type(request).__name__} is not a request")
    else:
        try:
            reply = answer(site_from(context.node_config), request)
        except ConsiliumError as error:  # of the site's settings, which may name a file: that stays here
            log.error("%s", error)
            reply = Refusal("", "its site settings are wrong; the sentence is in the centre's log")
    return Message(content=to_records(reply), reply_to=message)


app.query()(_reply)
app.train()(_reply)
