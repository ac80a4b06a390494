//! The files of the status page. They are part of the executable: nothing is installed beside it, and nothing is fetched from
//! elsewhere.

use super::answer::Tagged;
use axum::http::StatusCode;

const HTML: &str = "text/html; charset=utf-8";
const CSS: &str = "text/css; charset=utf-8";
const SCRIPT: &str = "text/javascript; charset=utf-8";
const SVG: &str = "image/svg+xml";

/// Path, media type and content.
static FILES: [(&str, &str, &str); 13] = [
    ("/", HTML, include_str!("page/index.html")),
    ("/page/style.css", CSS, include_str!("page/style.css")),
    ("/page/icon.svg", SVG, include_str!("page/icon.svg")),
    ("/page/theme.js", SCRIPT, include_str!("page/theme.js")),
    ("/page/app.js", SCRIPT, include_str!("page/app.js")),
    ("/page/api.js", SCRIPT, include_str!("page/api.js")),
    ("/page/dom.js", SCRIPT, include_str!("page/dom.js")),
    ("/page/format.js", SCRIPT, include_str!("page/format.js")),
    ("/page/chart.js", SCRIPT, include_str!("page/chart.js")),
    ("/page/cluster.js", SCRIPT, include_str!("page/cluster.js")),
    ("/page/jobs.js", SCRIPT, include_str!("page/jobs.js")),
    ("/page/job.js", SCRIPT, include_str!("page/job.js")),
    ("/page/nodes.js", SCRIPT, include_str!("page/nodes.js")),
];

/// Every file by its path.
pub fn all() -> impl Iterator<Item = (&'static str, Tagged)> {
    FILES
        .iter()
        .map(|&(path, kind, text)| (path, Tagged::new(StatusCode::OK, kind, text)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn every_file_is_served_and_whatever_one_names_is_there() {
        let served: BTreeSet<&str> = FILES.iter().map(|(path, ..)| *path).collect();
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src/web/page");
        for file in std::fs::read_dir(folder).expect("the page's folder") {
            let name = file.expect("a file").file_name().into_string().expect("a name");
            let path = match name.as_str() {
                "index.html" => "/".to_owned(),
                _ => format!("/page/{name}"),
            };
            assert!(served.contains(path.as_str()), "{path} is not served");
        }
        for (path, _, text) in &FILES {
            for quoted in text.split('"').skip(1).step_by(2) {
                let named = match (quoted.strip_prefix("./"), quoted.strip_prefix("page/")) {
                    (Some(name), _) | (None, Some(name)) => format!("/page/{name}"),
                    (None, None) => continue,
                };
                assert!(
                    named == "/page/" || served.contains(named.as_str()),
                    "{path} names {named}"
                );
            }
            assert!(!text.contains("innerHTML"), "{path} makes markup of text");
        }
    }
}
