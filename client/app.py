"""Flower's ClientApp: records to a request, the answer back to records. All else is in client/federation/handlers.py."""

from __future__ import annotations

import logging
import os

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client.federation.handlers import handle_request
from client.site.config import parse_site
from common.protocol.flower_records import from_records, to_records
from common.protocol.messages import Refusal, Reply, Request
from common.utils.errors import ConsiliumError
from common.utils.log_setup import configure_logging

log = logging.getLogger("consilium.centre")
app = ClientApp()
if os.environ.get("CONSILIUM_LOG"):  # in a simulation only what is wrong is said
    configure_logging()


def _handle_message(message: Message, context: Context) -> Message:
    request = from_records(message.content)
    reply: Reply
    if not isinstance(request, Request):
        reply = Refusal("", f"{type(request).__name__} is not a request")
    else:
        try:
            reply = handle_request(parse_site(context.node_config), request)
        except ConsiliumError as error:  # of the site's settings, which may name a file: that stays here
            log.error("%s", error)
            reply = Refusal("", "its site settings are wrong; the sentence is in the centre's log")
    return Message(content=to_records(reply), reply_to=message)


app.query()(_handle_message)
app.train()(_handle_message)
