//! A Chromium without a window, driven through WebDriver by its own chromedriver, on free ports with its profile in a scratch
//! directory; killed when it is dropped.

use crate::{
    Process, etcd,
    http::request,
    wait::{self, Seen},
};
use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use std::{
    env,
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

/// For a browser to come up on a machine that compiles beside it.
const START: Duration = Duration::from_secs(60);

/// A browser that runs, with one tab.
pub struct Browser {
    // Kills the browser with it, which is of its process group.
    _driver: Process,
    address: String,
    session: String,
}

impl Browser {
    /// Starts it, with its files in a folder. `None` where no Chromium is installed, which is said on standard error; in CI
    /// that is an error.
    ///
    /// # Errors
    /// If it does not come up, or is missing in CI.
    pub fn start(folder: &Path) -> Result<Option<Self>> {
        let answers = |program| {
            let mut command = Command::new(program);
            command
                .arg("--version")
                .stdout(Stdio::null())
                .stderr(Stdio::null());
            command.status().is_ok_and(|status| status.success())
        };
        if !(answers("chromium") && answers("chromedriver")) {
            let missing =
                "no Chromium is installed (apt: chromium chromium-driver, or run scripts/setup.sh browser)";
            if env::var_os("CI").is_some() {
                bail!("{missing}");
            }
            eprintln!("SKIPPED: {missing}");
            return Ok(None);
        }
        let port = etcd::free_port()?.port();
        let mut command = Command::new("chromedriver");
        command
            .arg(format!("--port={port}"))
            .env("HOME", folder)
            .current_dir(folder)
            .stdin(Stdio::null());
        let mut driver = Process::start("chromedriver", &folder.join("logs"), command)?;
        let address = format!("127.0.0.1:{port}");
        wait::until("chromedriver to answer", START, || {
            if let Some(status) = driver.ended()? {
                bail!("chromedriver ended ({status}): {}", driver.output());
            }
            Ok(match request(&address, "GET", "/status", "") {
                Ok((200, _)) => Seen::Yes(()),
                other => Seen::NotYet(format!("{other:?}")),
            })
        })?;
        let profile = folder.join("browser");
        let arguments = [
            "--headless=new",
            // Its sandbox refuses to run as root, as in containers; it sees pages of this machine alone.
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--disable-background-networking",
            "--no-first-run",
            "--hide-scrollbars",
            "--force-color-profile=srgb",
            "--lang=en",
            "--window-size=1280,800",
            &format!("--user-data-dir={}", profile.display()),
        ];
        let wanted = json!({"capabilities": {"alwaysMatch": {
            "browserName": "chrome",
            "goog:chromeOptions": {"args": arguments},
            "goog:loggingPrefs": {"browser": "ALL"},
        }}});
        let mut browser = Self {
            _driver: driver,
            address,
            session: String::new(),
        };
        let session = browser.command("POST", "/session", &wanted)?;
        browser.session = session["sessionId"].as_str().context("a session")?.to_owned();
        Ok(Some(browser))
    }

    fn command(&self, method: &str, path: &str, body: &Value) -> Result<Value> {
        let body = match method {
            "GET" => String::new(),
            _ => body.to_string(),
        };
        let (status, answer) = request(&self.address, method, path, &body)?;
        let mut answer: Value =
            serde_json::from_str(&answer).with_context(|| format!("{path} answered {answer:?}"))?;
        ensure!(status == 200, "{path}: {answer}");
        Ok(answer["value"].take())
    }

    fn of_session(&self, method: &str, path: &str, body: &Value) -> Result<Value> {
        let path = format!("/session/{}/{path}", self.session);
        self.command(method, path.trim_end_matches('/'), body)
    }

    /// Goes to a page and waits until it has loaded.
    ///
    /// # Errors
    /// If it cannot be reached.
    pub fn open(&self, url: &str) -> Result<()> {
        self.of_session("POST", "url", &json!({"url": url}))?;
        Ok(())
    }

    /// Runs the body of a function in the page, and gives what it returns.
    ///
    /// # Errors
    /// If it throws.
    pub fn run(&self, script: &str) -> Result<Value> {
        self.of_session("POST", "execute/sync", &json!({"script": script, "args": []}))
    }

    /// The same for a function that calls `arguments[0]` with its result later.
    ///
    /// # Errors
    /// If it throws, or does not call.
    pub fn run_async(&self, script: &str) -> Result<Value> {
        self.of_session("POST", "execute/async", &json!({"script": script, "args": []}))
    }

    /// A command of the DevTools protocol.
    ///
    /// # Errors
    /// If the browser refuses it.
    pub fn devtools(&self, command: &str, parameters: Value) -> Result<Value> {
        let body = json!({"cmd": command, "params": parameters});
        self.of_session("POST", "goog/cdp/execute", &body)
    }

    /// Shows pages as a reader has it who wants light or dark ones, on a screen of this size.
    ///
    /// # Errors
    /// If the browser refuses.
    pub fn look_like(&self, scheme: &str, width: u32, height: u32) -> Result<()> {
        let feature = json!({"name": "prefers-color-scheme", "value": scheme});
        self.devtools("Emulation.setEmulatedMedia", json!({"features": [feature]}))?;
        let screen = json!({"width": width, "height": height, "deviceScaleFactor": 1, "mobile": false});
        self.devtools("Emulation.setDeviceMetricsOverride", screen)?;
        Ok(())
    }

    /// Presses a key, as `KeyboardEvent.key` names it, with its `keyCode`.
    ///
    /// # Errors
    /// If the browser refuses.
    pub fn press(&self, key: &str, code: u32) -> Result<()> {
        for kind in ["rawKeyDown", "keyUp"] {
            let event = json!({"type": kind, "key": key, "code": key, "windowsVirtualKeyCode": code});
            self.devtools("Input.dispatchKeyEvent", event)?;
        }
        Ok(())
    }

    /// Complaints in the page's console since the last call: errors, failed requests, breaks of the content policy.
    ///
    /// # Errors
    /// If the browser does not say.
    pub fn complaints(&self) -> Result<Vec<String>> {
        let entries = self.of_session("POST", "se/log", &json!({"type": "browser"}))?;
        Ok(entries
            .as_array()
            .context("a list of log entries")?
            .iter()
            .filter(|entry| entry["level"] != "INFO" && entry["level"] != "DEBUG")
            .map(Value::to_string)
            .collect())
    }

    /// What is on the screen, as PNG.
    ///
    /// # Errors
    /// If the browser does not say.
    pub fn screenshot(&self) -> Result<Vec<u8>> {
        let picture = self.of_session("GET", "screenshot", &Value::Null)?;
        from_base64(picture.as_str().context("a picture")?).context("base64")
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        if !self.session.is_empty() {
            // Without it the driver is killed, and the browser with it, but for helpers that have left its group.
            let _gone = self.of_session("DELETE", "", &json!({}));
        }
    }
}

/// Bytes of a text in base64; `None` if it is none.
fn from_base64(text: &str) -> Option<Vec<u8>> {
    let digits: Vec<u8> = text
        .trim_end_matches('=')
        .bytes()
        .map(|c| {
            Some(match c {
                b'A'..=b'Z' => c - b'A',
                b'a'..=b'z' => c - b'a' + 26,
                b'0'..=b'9' => c - b'0' + 52,
                b'+' => 62,
                b'/' => 63,
                _ => return None,
            })
        })
        .collect::<Option<_>>()?;
    let bytes = digits.chunks(4).flat_map(|chunk| {
        let bits = chunk
            .iter()
            .fold(0_u32, |bits, digit| bits << 6 | u32::from(*digit));
        let bits = bits << (6 * (4 - chunk.len()));
        bits.to_be_bytes()[1..chunk.len()].to_vec()
    });
    Some(bytes.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_is_read_with_and_without_padding() {
        assert_eq!(from_base64("AQID"), Some(vec![1, 2, 3]));
        assert_eq!(from_base64("AQIDBA=="), Some(vec![1, 2, 3, 4]));
        assert_eq!(from_base64("AQIDBP8="), Some(vec![1, 2, 3, 4, 255]));
        assert_eq!(from_base64("?"), None);
    }
}
