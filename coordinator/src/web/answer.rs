//! What every answer has: its kind, how long it may be kept, and what a browser may do with it.

use axum::{
    body::{Body, Bytes},
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::Response,
};
use std::hash::{DefaultHasher, Hash, Hasher};

/// The page runs its own scripts, shows its own images and asks its own server; nothing from elsewhere, nothing inline, in
/// no frame, and no text becomes markup.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; \
                      form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'";

/// Plain text for people.
pub const TEXT: &str = "text/plain; charset=utf-8";
/// What the API answers with.
pub const JSON: &str = "application/json";

/// A body that may be asked for again, with the tag by which it is known.
#[derive(Clone, Debug)]
pub struct Tagged {
    /// How it went.
    pub status: StatusCode,
    /// Media type.
    pub kind: &'static str,
    /// The content.
    pub body: Bytes,
    tag: HeaderValue,
}

impl Tagged {
    /// Tags a body by what is in it.
    pub fn new(status: StatusCode, kind: &'static str, body: impl Into<Bytes>) -> Self {
        let body = body.into();
        let mut hasher = DefaultHasher::new();
        (env!("CARGO_PKG_VERSION"), &body).hash(&mut hasher);
        let tag = format!("\"{:016x}-{:x}\"", hasher.finish(), body.len());
        Self {
            status,
            kind,
            body,
            tag: HeaderValue::from_str(&tag).expect("digits, a dash and quotes"),
        }
    }

    /// The answer to a client with these headers: without the body if it has it already.
    pub fn answer(&self, headers: &HeaderMap) -> Response {
        let known = headers
            .get_all(header::IF_NONE_MATCH)
            .iter()
            .flat_map(|value| value.as_bytes().split(|byte| *byte == b','))
            .any(|tag| tag.trim_ascii() == self.tag.as_bytes());
        let mut answer = match known && self.status == StatusCode::OK {
            true => answer(StatusCode::NOT_MODIFIED, self.kind, Body::empty()),
            false => answer(self.status, self.kind, self.body.clone()),
        };
        answer.headers_mut().insert(header::ETAG, self.tag.clone());
        answer
    }
}

/// An answer that is good for now: a browser asks again before it shows it another time.
pub fn answer(status: StatusCode, kind: &'static str, body: impl Into<Body>) -> Response {
    let mut answer = Response::new(body.into());
    *answer.status_mut() = status;
    let headers = answer.headers_mut();
    for (name, value) in [
        (header::CONTENT_TYPE, kind),
        (header::CACHE_CONTROL, "no-cache, private"),
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    answer
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_body_that_a_client_has_is_not_sent_again() {
        let tagged = Tagged::new(StatusCode::OK, JSON, "{}");
        let whole = tagged.answer(&HeaderMap::new());
        assert_eq!(whole.status(), StatusCode::OK);
        let tag = whole.headers()[header::ETAG].clone();
        let asks_for = |tags: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::IF_NONE_MATCH, tags.parse().expect("a header"));
            tagged.answer(&headers).status()
        };
        let tag = tag.to_str().expect("text");
        assert_eq!(asks_for(tag), StatusCode::NOT_MODIFIED);
        assert_eq!(asks_for(&format!("\"x\", {tag}")), StatusCode::NOT_MODIFIED);
        assert_eq!(asks_for("\"x\""), StatusCode::OK);
        let other = Tagged::new(StatusCode::OK, JSON, "[]");
        assert_ne!(other.tag, tagged.tag);
    }
}
