import signal

from rocr.signals import postponed_signals


def test_signals_wait_until_the_context_ends():
    came = []
    handlers = {
        number: signal.signal(number, lambda n, _: came.append(n)) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        with postponed_signals():
            for number in handlers:
                signal.raise_signal(number)
            assert came == []
        assert came == [signal.SIGINT, signal.SIGTERM]
        signal.raise_signal(signal.SIGINT)
        assert came[2:] == [signal.SIGINT], "the handlers are back"
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
