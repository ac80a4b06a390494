//! One span: what took from when to when, of what it is a part, and whether it went well.

use crate::{context, sender::TRACER};
use opentelemetry::{
    Context, KeyValue,
    trace::{Link, Span as _, SpanContext, Status, TraceContextExt, Tracer},
};
use opentelemetry_sdk::trace::Span as Recorded;
use std::time::SystemTime;

/// A span that has begun; it ends when it is dropped, if not before. Nothing where no traces are sent.
#[derive(Debug, Default)]
pub struct Span(Option<Box<Recorded>>);

impl Span {
    /// The first of a trace.
    pub fn root(name: &'static str, begin: SystemTime) -> Self {
        Self::begin(name, begin, None, None)
    }

    /// The first of a trace that came of a span of another process. `of` is that one's [`Span::context`]; a text that names no
    /// span is left out.
    pub fn root_linked(of: &str, name: &'static str, begin: SystemTime) -> Self {
        Self::begin(name, begin, None, Some(of))
    }

    /// One in the trace of another process. `parent` is a [`Span::context`] of it; where that names no span, there is none.
    pub fn under(parent: &str, name: &'static str, begin: SystemTime) -> Self {
        match context::parse(parent) {
            Some(parent) => Self::begin(name, begin, Some(parent), None),
            None => Self::default(),
        }
    }

    /// A part of this one.
    pub fn child(&self, name: &'static str, begin: SystemTime) -> Self {
        match &self.0 {
            Some(span) => Self::begin(name, begin, Some(span.span_context().clone()), None),
            None => Self::default(),
        }
    }

    fn begin(name: &'static str, begin: SystemTime, parent: Option<SpanContext>, link: Option<&str>) -> Self {
        Self(TRACER.get().map(|tracer| {
            let link = link.and_then(context::parse);
            let builder = tracer
                .span_builder(name)
                .with_start_time(begin)
                .with_links(link.into_iter().map(Link::with_context).collect());
            // What the current context of this thread holds is no concern of ours.
            let nothing = Context::new();
            Box::new(match parent {
                Some(parent) => tracer.build_with_context(builder, &nothing.with_remote_span_context(parent)),
                None => tracer.build_with_context(builder, &nothing),
            })
        }))
    }

    /// With an attribute of text.
    pub fn text(mut self, key: &'static str, value: &str) -> Self {
        if let Some(span) = &mut self.0 {
            span.set_attribute(KeyValue::new(key, value.to_owned()));
        }
        self
    }

    /// With an attribute that is a number.
    pub fn number(mut self, key: &'static str, value: u64) -> Self {
        if let Some(span) = &mut self.0 {
            // OpenTelemetry has no unsigned numbers.
            span.set_attribute(KeyValue::new(key, i64::try_from(value).unwrap_or(i64::MAX)));
        }
        self
    }

    /// What it is about went wrong.
    pub fn failed(mut self, why: &str) -> Self {
        if let Some(span) = &mut self.0 {
            span.set_status(Status::error(why.to_owned()));
        }
        self
    }

    /// True where no traces are sent, and for one that has ended.
    pub fn is_none(&self) -> bool {
        self.0.is_none()
    }

    /// For [`Span::under`] in another process; empty where there is no span.
    pub fn context(&self) -> String {
        self.0
            .as_ref()
            .map_or_else(String::new, |span| context::format(span.span_context()))
    }

    /// It ended then.
    pub fn end(mut self, at: SystemTime) {
        if let Some(span) = &mut self.0 {
            span.end_with_timestamp(at);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// No test of this process sends traces, so none are made.
    #[test]
    fn without_a_collector_there_are_no_spans() {
        let now = SystemTime::now();
        let parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        let root = Span::root("a", now).text("key", "value").number("n", 1);
        assert_eq!(root.child("b", now).context(), "");
        assert_eq!(Span::under(parent, "c", now).context(), "");
        assert_eq!(Span::root_linked(parent, "d", now).context(), "");
        assert!(root.is_none());
        assert_eq!(root.failed("why").context(), "");
    }
}
