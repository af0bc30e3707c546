"""Your function: `handle` answers each request, with the model of GLOWPLUG_MODEL in `context.model`."""


def handle(event, context):
    """Answers the question in the body: whole, or as it is written with Accept: text/event-stream or ?stream=1."""
    question = event.body.decode("utf-8", "replace").strip() or "What is Glowplug?"
    stream = event.query.get("stream") == "1" or "text/event-stream" in event.headers.get("Accept", "")
    answer = context.model.generate(messages=[{"role": "user", "content": question}], stream=stream, max_tokens=200)
    if stream:
        return answer  # an iterator: every piece of text is sent as soon as it is there
    return {"statusCode": 200, "headers": {"Content-Type": "text/plain; charset=utf-8"}, "body": answer}
