//! The status page in a browser, on a real cluster with a real job: what happens is soon on it, texts of users
//! stay texts, everybody can use it, and it complains of nothing.

use anyhow::{Context, Result, ensure};
use arcface_tests::{
    Browser, Cluster, JobFile, Options,
    wait::{self, Seen},
    write_identities,
};
use nix::sys::signal::Signal;
use serde_json::Value;
use std::{env, fs, path::Path, sync::LazyLock, time::Duration};

const TRAINED: Duration = Duration::from_secs(240);
/// From an event until it is on the page. Two seconds is what the page promises, and what `ARCFACE_VISIBLE_S=2` holds it to on a
/// machine that does nothing else; one that compiles or tests beside it must not fail for that.
static VISIBLE: LazyLock<Duration> = LazyLock::new(|| {
    let asked = env::var("ARCFACE_VISIBLE_S").ok();
    Duration::from_secs(asked.map_or(10, |seconds| {
        seconds.parse().expect("ARCFACE_VISIBLE_S is in whole seconds")
    }))
});
/// For what waits on something else than the page, too.
const SOON: Duration = Duration::from_secs(30);

/// What somebody could call a job who means ill.
const HOSTILE: &str = "<img src=x onerror=window.owned=1>";

/// A page in a browser.
struct Page<'a> {
    browser: &'a Browser,
    address: String,
}

impl<'a> Page<'a> {
    fn open(browser: &'a Browser, address: String) -> Result<Self> {
        let page = Self { browser, address };
        page.go("/")?;
        Ok(page)
    }

    /// Shows what stands after the #.
    fn go(&self, to: &str) -> Result<()> {
        self.browser.open("about:blank")?;
        self.browser.open(&format!("http://{}/#{to}", self.address))
    }

    /// Waits until a script says `true`.
    fn shows(&self, what: &str, deadline: Duration, script: &str) -> Result<()> {
        wait::until(&format!("the page to show {what}"), deadline, || {
            Ok(match self.browser.run(script)? {
                Value::Bool(true) => Seen::Yes(()),
                other => Seen::NotYet(format!("{other}: {}", self.text()?)),
            })
        })
    }

    /// Waits until a text stands somewhere.
    fn says(&self, text: &str, deadline: Duration) -> Result<()> {
        let script = format!("return document.body.innerText.includes({});", Value::from(text));
        self.shows(&format!("{text:?}"), deadline, &script)
    }

    fn text(&self) -> Result<String> {
        let text = self.browser.run("return document.body.innerText;")?;
        Ok(text.as_str().unwrap_or_default().to_owned())
    }

    fn complains_of_nothing(&self) -> Result<()> {
        let complaints = self.browser.complaints()?;
        ensure!(complaints.is_empty(), "{}", complaints.join("\n"));
        Ok(())
    }
}

/// A state of a job as its badge has it.
fn badge(state: &str) -> String {
    format!(
        "return [...document.querySelectorAll('main .state')].some((badge) => badge.textContent === '{state}');"
    )
}

/// More points than one on a curve.
fn curve(name: &str) -> String {
    format!(
        "return (document.querySelector('[data-own={name}] path.line')?.getAttribute('d') ?? '').includes('L');"
    )
}

/// A job that is evaluated and makes checkpoints, of 4 steps an epoch.
fn evaluated(scratch: &Path, name: &str, epochs: u32) -> Result<JobFile> {
    write_identities(scratch, "faces", 8, 8, 20)?;
    Ok(JobFile {
        rec: "faces".into(),
        checkpoint_steps: 4,
        more: "[eval]\nverbose = 8\nval_targets = [\"synth\"]".into(),
        ..JobFile::tiny(name).epochs(epochs)
    })
}

/// Submits a job under another name.
fn submit_as(cluster: &Cluster, job: &JobFile, name: &str) -> Result<String> {
    let file = job.write(cluster.scratch())?;
    let name = format!("job.name={}", Value::from(name));
    let job = cluster.json(&["submit", &file.to_string_lossy(), "--set", &name])?;
    Ok(job["id"].as_str().context("an id")?.to_owned())
}

/// Kills a rank once there is a checkpoint, and waits until the coordinator knows.
fn lose_a_rank(cluster: &mut Cluster, id: &str) -> Result<()> {
    cluster.wait_for_job(id, "to have a checkpoint", TRAINED, |job| {
        job["checkpoint_step"].as_u64() >= Some(8)
    })?;
    let ranks = cluster.rank_pids(id)?;
    let (_, victim) = ranks.get(1).context("rank 1 runs")?;
    cluster.signal(*victim, Signal::SIGKILL)?;
    cluster.wait_for_job(id, "to have lost a rank", SOON, |job| {
        job["recoveries"].as_array().is_some_and(|list| !list.is_empty())
    })?;
    Ok(())
}

#[test]
fn what_happens_to_a_job_is_soon_on_the_page() -> Result<()> {
    Cluster::run(Options::default(), |cluster| {
        let Some(browser) = Browser::start(cluster.scratch())? else {
            return Ok(());
        };
        let job = evaluated(cluster.scratch(), "watched", 30)?;
        let page = Page::open(&browser, cluster.metrics_address()?)?;
        page.says("No jobs yet.", SOON)?;
        page.says("leads", *VISIBLE)?;

        let id = submit_as(cluster, &job, HOSTILE)?;
        page.says(HOSTILE, *VISIBLE)?;
        let queued = cluster.submit(&JobFile::tiny("waits"))?;
        page.says(&queued, *VISIBLE)?;
        let reason = cluster.wait_for_job(&queued, "to say what it waits for", SOON, |job| {
            job["reason"].as_str().is_some_and(|reason| !reason.is_empty())
        })?;
        page.says(reason["reason"].as_str().context("a reason")?, *VISIBLE)?;
        cluster.wait_for_state(&id, "running", TRAINED)?;
        page.shows("a running job", *VISIBLE, &badge("running"))?;
        let hostile = "return window.owned === undefined && document.querySelector('main img') === null;";
        page.shows("no image", *VISIBLE, hostile)?;

        // A link to the job is as good as a click.
        page.go(&format!("/jobs/{id}"))?;
        page.shows(
            "the job's name",
            SOON,
            &format!(
                "return document.querySelector('h1')?.textContent === {};",
                Value::from(HOSTILE)
            ),
        )?;
        let job = cluster.wait_for_job(&id, "to have trained some steps", TRAINED, |job| {
            job["step"].as_u64() >= Some(4)
        })?;
        page.shows("the loss", *VISIBLE, &curve("loss"))?;
        page.shows("the speed", *VISIBLE, &curve("speed"))?;
        ensure!(job["eta_seconds"].as_f64().is_some_and(|eta| eta > 0.0), "{job}");
        for (_, pid) in cluster.rank_pids(&id)? {
            page.says(&pid.to_string(), *VISIBLE)?;
        }
        page.says("4 \u{2013} 7", *VISIBLE)?; // classes of rank 1 of 2
        cluster.wait_for_job(&id, "to be evaluated", TRAINED, |job| {
            job["evaluations"].as_array().is_some_and(|list| !list.is_empty())
        })?;
        page.shows("an evaluation", *VISIBLE, "return document.querySelector('[aria-labelledby=evaluations] tbody td')?.textContent === 'synth';")?;

        lose_a_rank(cluster, &id)?;
        page.says("was killed by signal 9: detected after", *VISIBLE)?;
        let job = cluster.wait_for_job(&id, "to be back", TRAINED, |job| {
            job["recoveries"][0]["total_s"].is_number()
        })?;
        let total = job["recoveries"][0]["total_s"].as_f64().context("seconds")?;
        page.says(&format!("back after {total:.1} s"), *VISIBLE)?;
        page.shows(
            "where it resumed",
            *VISIBLE,
            "return document.querySelector('[data-own=loss] .mark') !== null;",
        )?;
        page.shows(
            "checkpoints",
            *VISIBLE,
            "return document.querySelector('[aria-labelledby=checkpoints] tbody th') !== null;",
        )?;

        // The pointer and the keys read single points.
        browser.run("document.querySelector('[data-own=loss] svg').focus();")?;
        browser.press("ArrowLeft", 37)?;
        browser.press("ArrowLeft", 37)?;
        page.shows(
            "what the keys point at",
            *VISIBLE,
            "return document.querySelector('[data-own=loss] .pointer') !== null;",
        )?;

        cluster.wait_for_state(&id, "succeeded", TRAINED)?;
        page.shows("that it has succeeded", *VISIBLE, &badge("succeeded"))?;
        page.shows(
            "it to those who do not see",
            *VISIBLE,
            "return document.getElementById('news').textContent.endsWith(': succeeded');",
        )?;
        let hash = "return document.activeElement.closest('[data-own]')?.dataset.own === 'loss';";
        page.shows("the focus where it was", *VISIBLE, hash)?;
        cluster.wait_for_state(&queued, "succeeded", TRAINED)?;

        page.go("/nodes")?;
        page.says("Last heartbeat", SOON)?;
        cluster.kill_worker()?;
        cluster.wait_for_nodes(1)?;
        page.shows("a node that is silent", *VISIBLE, "return [...document.querySelectorAll('main .state')].some((badge) => badge.textContent !== 'healthy');")?;
        page.complains_of_nothing()?;

        page.go("/jobs/job-000000000000")?;
        page.says("there is no job", SOON)?;
        page.go("/")?;
        page.says(&id, SOON)?;
        cluster.kill_coordinator()?;
        page.says("Not connected, trying again. Figures are of ", SOON)?;
        page.says(&id, *VISIBLE)
    })
}

#[test]
fn a_failed_job_says_why() -> Result<()> {
    Cluster::run(Options::default(), |cluster| {
        let Some(browser) = Browser::start(cluster.scratch())? else {
            return Ok(());
        };
        let job = JobFile {
            rec: "nowhere".into(),
            job: "max_restarts = 0\n".into(),
            ..JobFile::tiny("fails")
        };
        let page = Page::open(&browser, cluster.metrics_address()?)?;
        let id = cluster.submit(&job)?;
        let job = cluster.wait_for_state(&id, "failed", TRAINED)?;
        page.shows("that it has failed", *VISIBLE, &badge("failed"))?;
        page.says(job["reason"].as_str().context("a reason")?, *VISIBLE)?;
        page.complains_of_nothing()
    })
}

#[test]
fn a_standby_says_who_leads() -> Result<()> {
    let options = Options { workers: 0, slots: 1 };
    Cluster::run_on_etcd(options, 2, |cluster| {
        let Some(browser) = Browser::start(cluster.scratch())? else {
            return Ok(());
        };
        let leader = cluster.wait_for_leader()?;
        let addresses = cluster.addresses();
        let address = addresses.split(',').nth(leader).context("its address")?;
        let page = Page::open(&browser, cluster.metrics_address_of(1 - leader)?)?;
        page.says("This coordinator stands by", SOON)?;
        page.says(&format!("{address} leads"), SOON)?;
        page.complains_of_nothing()?;
        cluster.end_coordinator(leader, Signal::SIGTERM)?;
        cluster.wait_for_role(1 - leader, true)?;
        page.says("No jobs yet.", *VISIBLE)
    })
}

/// What axe finds wrong with the page: rules with the elements that break them.
fn violations(browser: &Browser) -> Result<Vec<String>> {
    let found = browser.run_async(
        "const done = arguments[arguments.length - 1];
         axe.run(document, {resultTypes: ['violations']}).then(
             ({violations}) => done(violations.flatMap((rule) => rule.nodes.map((node) =>
                 `${rule.id}: ${node.target} ${node.failureSummary}`))),
             (error) => done([String(error)]));",
    )?;
    let found = found.as_array().context("a list")?;
    Ok(found.iter().map(Value::to_string).collect())
}

/// The script of axe; `None` where it was not fetched, which is said on standard error.
fn axe() -> Result<Option<String>> {
    let file = env::var_os("ARCFACE_BROWSER_TOOLS")
        .map(|folder| Path::new(&folder).join("axe_playwright_python/axe.min.js"))
        .filter(|file| file.is_file());
    let Some(file) = file else {
        ensure!(
            env::var_os("CI").is_none(),
            "axe is missing: run scripts/setup.sh browser and source scripts/env.sh"
        );
        eprintln!("SKIPPED: axe is missing: run scripts/setup.sh browser and source scripts/env.sh");
        return Ok(None);
    };
    Ok(Some(fs::read_to_string(file)?))
}

#[test]
fn everybody_can_use_it() -> Result<()> {
    Cluster::run(Options::default(), |cluster| {
        let Some(browser) = Browser::start(cluster.scratch())? else {
            return Ok(());
        };
        let Some(axe) = axe()? else { return Ok(()) };
        let job = evaluated(cluster.scratch(), "usable", 1000)?;
        let id = cluster.submit(&job)?;
        cluster.submit(&JobFile::tiny("waits"))?;
        let page = Page::open(&browser, cluster.metrics_address()?)?;
        lose_a_rank(cluster, &id)?;
        cluster.wait_for_state(&id, "running", TRAINED)?;
        // axe makes styles of its own, which the page's policy refuses to everybody else.
        browser.devtools("Page.setBypassCSP", serde_json::json!({"enabled": true}))?;
        for (scheme, width, height) in [("light", 1280, 800), ("dark", 1280, 800), ("light", 390, 844)] {
            browser.look_like(scheme, width, height)?;
            for (to, shown) in [
                ("/".to_owned(), badge("running")),
                ("/nodes".to_owned(), badge("healthy")),
                (format!("/jobs/{id}"), curve("accuracy")),
            ] {
                page.go(&to)?;
                page.shows(&to, SOON, &shown)?;
                browser.run(&axe)?;
                let found = violations(&browser)?;
                ensure!(
                    found.is_empty(),
                    "{to} in {scheme}, {width} wide:\n{}",
                    found.join("\n")
                );
                let fits = format!("return document.documentElement.scrollWidth <= {width};");
                page.shows("nothing beyond the screen's edge", *VISIBLE, &fits)?;
            }
        }
        // The first stop of the keyboard is the way past the header.
        page.go("/")?;
        page.shows("jobs", SOON, &badge("running"))?;
        browser.press("Tab", 9)?;
        page.shows(
            "the way to the content",
            *VISIBLE,
            "return document.activeElement.id === 'skip' && document.activeElement.getBoundingClientRect().top >= 0;",
        )?;
        // The choice of colours is remembered.
        let theme = "return document.documentElement.dataset.theme ?? 'system';";
        for chosen in ["light", "dark", "system"] {
            browser.run("document.getElementById('theme').click();")?;
            page.go("/")?;
            ensure!(browser.run(theme)? == chosen, "{chosen} was not remembered");
        }
        page.complains_of_nothing()
    })
}

/// Pictures for the documents, if `ARCFACE_SCREENSHOTS` names a folder for them (`scripts/screenshots.sh`).
#[test]
fn pictures_of_a_running_job() -> Result<()> {
    let Some(folder) = env::var_os("ARCFACE_SCREENSHOTS") else {
        return Ok(());
    };
    Cluster::run(Options::default(), |cluster| {
        let Some(browser) = Browser::start(cluster.scratch())? else {
            return Ok(());
        };
        write_identities(cluster.scratch(), "faces", 50, 16, 100)?;
        let job = |name: &str, epochs| JobFile {
            rec: "faces".into(),
            num_image: 800,
            num_classes: 50,
            lr: 0.05,
            checkpoint_steps: 20,
            more: "[eval]\nverbose = 40\nval_targets = [\"synth\"]".into(),
            ..JobFile::tiny(name).epochs(epochs)
        };
        let before = cluster.submit(&job("warm_up", 1))?;
        cluster.wait_for_state(&before, "succeeded", TRAINED)?;
        let id = cluster.submit(&job("fifty_identities", 10))?;
        cluster.wait_for_job(&id, "to be half-way", TRAINED, |job| {
            job["step"].as_u64() >= Some(130)
        })?;
        lose_a_rank(cluster, &id)?;
        cluster.wait_for_state(&id, "running", TRAINED)?;
        // Not before: it would take the slots that the failure leaves for a moment.
        cluster.submit(&job("fifty_identities_longer", 20))?;
        cluster.wait_for_job(&id, "to have come far", TRAINED, |job| {
            job["step"].as_u64() >= Some(330)
        })?;
        let page = Page::open(&browser, cluster.metrics_address()?)?;
        for (to, shown, name) in [
            ("/".to_owned(), badge("running"), "jobs"),
            (format!("/jobs/{id}"), curve("accuracy"), "job"),
        ] {
            for scheme in ["light", "dark"] {
                browser.look_like(scheme, 1280, 800)?;
                page.go(&to)?;
                page.shows(&to, SOON, &shown)?;
                let file = Path::new(&folder).join(format!("status_page_{name}_{scheme}.png"));
                fs::write(&file, browser.screenshot()?)?;
            }
        }
        page.complains_of_nothing()
    })
}
