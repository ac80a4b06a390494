//! Which span another process hangs its own under: a `traceparent` of the W3C recommendation "Trace Context".

use opentelemetry::trace::{SpanContext, SpanId, TraceFlags, TraceId, TraceState};

/// The span as text.
pub(crate) fn format(span: &SpanContext) -> String {
    format!(
        "00-{}-{}-{:02x}",
        span.trace_id(),
        span.span_id(),
        span.trace_flags() & TraceFlags::SAMPLED
    )
}

/// The span that a text names; `None` where it names none. Versions after ours may have more fields behind the same four.
pub(crate) fn parse(text: &str) -> Option<SpanContext> {
    let mut fields = text.split('-');
    let version = hex(fields.next()?, 2)?;
    let trace = hex(fields.next()?, 32)?;
    let span = hex(fields.next()?, 16)?;
    let flags = hex(fields.next()?, 2)?;
    if version == "ff" || version == "00" && fields.next().is_some() {
        return None;
    }
    let flags = TraceFlags::new(u8::from_str_radix(flags, 16).ok()?);
    let context = SpanContext::new(
        TraceId::from_hex(trace).ok()?,
        SpanId::from_hex(span).ok()?,
        flags & TraceFlags::SAMPLED,
        true,
        TraceState::NONE,
    );
    context.is_valid().then_some(context)
}

/// A field of so many digits, which are lower case.
fn hex(field: &str, digits: usize) -> Option<&str> {
    let is_digit = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
    (field.len() == digits && field.bytes().all(is_digit)).then_some(field)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The recommendation's own example.
    const GOOD: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    #[test]
    fn a_span_is_the_same_after_its_way_as_text() {
        let span = parse(GOOD).expect("it is valid");
        assert_eq!(span.trace_id().to_string(), "0af7651916cd43dd8448eb211c80319c");
        assert_eq!(span.span_id().to_string(), "b7ad6b7169203331");
        assert!(span.is_sampled() && span.is_remote());
        assert_eq!(format(&span), GOOD);
    }

    #[test]
    fn nobody_records_what_the_first_process_does_not() {
        let unsampled = GOOD.replace("-01", "-00");
        let span = parse(&unsampled).expect("it is valid");
        assert!(!span.is_sampled());
        assert_eq!(format(&span), unsampled);
        // Flags that we do not know are not passed on.
        let flagged = parse(&GOOD.replace("-01", "-ff")).expect("it is valid");
        assert_eq!(format(&flagged), GOOD);
    }

    #[test]
    fn a_later_version_may_say_more() {
        for later in ["cc", "01"] {
            for more in ["", "-what-the-future-will-be-like"] {
                let text = format!("{later}{}{more}", &GOOD[2..]);
                assert_eq!(parse(&text), parse(GOOD), "{text}");
            }
        }
    }

    #[test]
    fn damaged_ones_name_no_span() {
        for bad in [
            "",
            "-",
            "00",
            "00-0af7651916cd43dd8448eb211c80319c",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-1",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-more",
            "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "0-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "00-00000000000000000000000000000000-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
            "00-xaf7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "00-+af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "00-0AF7651916CD43DD8448EB211C80319C-B7AD6B7169203331-01",
            "00-af-b7-01",
            " 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\n",
            "00-\u{e4}af7651916cd43dd8448eb211c80319-b7ad6b7169203331-01",
        ] {
            assert_eq!(parse(bad), None, "{bad:?}");
        }
    }
}
