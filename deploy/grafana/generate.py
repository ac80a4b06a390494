#!/usr/bin/env python3
"""Writes deploy/grafana/dashboards/*.json: python3 deploy/grafana/generate.py [--check]

A panel is a line or two here and forty in JSON; what all panels share (data source, colours, legend) is said once. With --check nothing is
written and the exit code is 1 if a file differs. Only panels that come with Grafana are used.
"""

import json
import sys
from pathlib import Path

FOLDER = Path(__file__).parent / "dashboards"
SOURCE = {"type": "prometheus", "uid": "${datasource}"}

GREEN, YELLOW, RED = "green", "yellow", "red"
# Colours of states and kinds, the same on every dashboard.
COLOURS = {
    "healthy": GREEN, "suspect": YELLOW, "lost": RED,
    "running": GREEN, "queued": "blue", "starting": "light-blue", "recovering": "orange", "cancelling": "purple",
    "succeeded": "dark-green", "failed": RED, "cancelled": "text",
}


def query(expr, legend="", instant=False, table=False):
    """One PromQL query; a panel gives it its letter."""
    target = {"datasource": SOURCE, "expr": " ".join(expr.split()), "legendFormat": legend or "__auto"}
    target["editorMode"] = "code"
    target["instant"], target["range"] = instant, not instant
    if table:
        target["format"] = "table"
    return target


def thresholds(steps):
    """[(from, colour), ...]; the first holds from below."""
    levels = [{"color": colour, "value": value} for value, colour in steps]
    levels[0]["value"] = None
    return {"mode": "absolute", "steps": levels}


def panel(kind, title, what, queries, size, unit="short", steps=None, decimals=None, top=None, options=None, custom=None, links=()):
    """A panel without its place. `size` is (width, height) of 24 columns; `links` are runbooks."""
    defaults = {"unit": unit, "color": {"mode": "thresholds" if steps else "palette-classic"}, "custom": custom or {}, "mappings": []}
    defaults["thresholds"] = thresholds(steps or [(None, GREEN)])
    if decimals is not None:
        defaults["decimals"] = decimals
    if top is not None:
        defaults["min"], defaults["max"] = 0, top
    names = {target["legendFormat"] for target in queries}
    overrides = []
    if "{{state}}" in names:
        overrides = [
            {"matcher": {"id": "byName", "options": name},
             "properties": [{"id": "color", "value": {"mode": "fixed", "fixedColor": colour}}]}
            for name, colour in COLOURS.items()
        ]
    return {
        "type": kind,
        "title": title,
        "description": what + "".join(f"\n\nRunbook: docs/runbooks/{name}.md" for name in links),
        "datasource": SOURCE,
        "targets": [dict(target, refId=chr(ord("A") + index)) for index, target in enumerate(queries)],
        "fieldConfig": {"defaults": defaults, "overrides": overrides},
        "options": options or {},
        "size": size,
    }


def stat(title, what, expr, unit="short", steps=None, size=(4, 4), decimals=None, legend="", words=False, links=()):
    """The newest value, big. `words` shows the series' name instead of its value."""
    options = {
        "colorMode": "value" if steps else "none",
        "graphMode": "none",
        "justifyMode": "auto",
        "orientation": "auto",
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "textMode": "name" if words else ("value_and_name" if legend else "value"),
        "wideLayout": True,
    }
    return panel("stat", title, what, [query(expr, legend, instant=True)], size, unit, steps, decimals, options=options, links=links)


def graph(title, what, queries, unit="short", size=(12, 8), stacked=False, bars=False, steps=None, top=None, points=False, links=()):
    """Lines over time; `queries` are (expr, legend)."""
    custom = {
        "drawStyle": "bars" if bars else "line",
        "fillOpacity": 60 if bars else (30 if stacked else 8),
        "lineWidth": 1,
        "pointSize": 4,
        "showPoints": "always" if points else "never",
        "spanNulls": False,
        "stacking": {"mode": "normal" if stacked else "none", "group": "A"},
        "thresholdsStyle": {"mode": "dashed" if steps else "off"},
    }
    options = {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
        "tooltip": {"mode": "multi", "sort": "desc"},
    }
    made = panel("timeseries", title, what, [query(*one) for one in queries], size, unit, steps, top=top, options=options, custom=custom, links=links)
    made["fieldConfig"]["defaults"]["color"] = {"mode": "palette-classic"}
    if top is None:
        made["fieldConfig"]["defaults"]["min"] = 0
    return made


def table(title, what, columns, size, key, hidden=(), links=(), goto=None):
    """A row a series; `columns` are (name, expr, unit), joined on the label `key`, whose cells lead to the dashboard `goto`."""
    queries = [query(expr, instant=True, table=True) for _, expr, _ in columns]
    options = {"cellHeight": "sm", "footer": {"show": False}, "showHeader": True}
    made = panel("table", title, what, queries, size, options=options, links=links)
    letters = [chr(ord("A") + index) for index in range(len(columns))]
    values = [f"Value #{letter}" for letter in letters] if len(columns) > 1 else ["Value"]
    names = {value: name for value, (name, _, _) in zip(values, columns) if name}
    unnamed = [value for value, (name, _, _) in zip(values, columns) if not name]
    made["transformations"] = [
        {"id": "merge", "options": {}},
        {"id": "organize", "options": {"excludeByName": {name: True for name in ["Time", *unnamed, *hidden]}, "indexByName": {}, "renameByName": names}},
    ]
    made["fieldConfig"]["overrides"] = [
        {"matcher": {"id": "byName", "options": name}, "properties": [{"id": "unit", "value": unit}]}
        for name, _, unit in columns
        if name and unit
    ]
    if goto:
        link = {"title": "Open", "url": f"/d/{goto}?var-{key}=${{__value.raw}}&${{datasource:queryparam}}&${{__url_time_range}}", "targetBlank": False}
        made["fieldConfig"]["overrides"].append({"matcher": {"id": "byName", "options": key}, "properties": [{"id": "links", "value": [link]}]})
    return made


def place(panels):
    """Left to right, then down; numbers in order."""
    x = y = row = 0
    for number, one in enumerate(panels, 1):
        width, height = one.pop("size")
        if x + width > 24:
            x, y, row = 0, y + row, 0
        one["id"] = number
        one["gridPos"] = {"x": x, "y": y, "w": width, "h": height}
        x, row = x + width, max(row, height)
    return panels


def choice(name, title, metric, several=False):
    """A variable with the values of a label."""
    ask = f"label_values({metric}, {name})"
    made = {
        "type": "query", "name": name, "label": title, "datasource": SOURCE, "definition": ask,
        "query": {"query": ask, "refId": "Variable"}, "refresh": 2, "sort": 1,
        "multi": several, "includeAll": several,
    }
    if several:
        made["allValue"] = ".*"
        made["current"] = {"text": ["All"], "value": ["$__all"]}
    return made


def dashboard(uid, title, what, panels, variables=(), generations=None):
    """A whole file. `generations` selects the jobs whose new generations are marked."""
    marks = []
    if generations:
        marks.append({
            "name": "New generation", "datasource": SOURCE, "enable": True, "iconColor": "orange", "titleFormat": "{{job_id}}: new generation",
            "expr": f"max by (job_id) (changes(arcface_rendezvous_generation{{{generations}}}[1m])) > 0", "step": "1m",
        })
    return {
        "uid": uid,
        "title": title,
        "description": what,
        "tags": ["arcface"],
        "schemaVersion": 41,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "",
        "annotations": {"list": marks},
        "links": [{"type": "dashboards", "title": "ArcFace", "tags": ["arcface"], "asDropdown": True, "includeVars": True, "keepTime": True,
                   "icon": "external link", "tooltip": "", "url": "", "targetBlank": False}],
        "templating": {"list": [
            {"type": "datasource", "name": "datasource", "label": "Data source", "query": "prometheus", "refresh": 1, "includeAll": False, "multi": False},
            *variables,
        ]},
        "panels": place(panels),
    }


JOBS = [choice("job_id", "Job", "arcface_job_state", several=True)]
JOB = [choice("job_id", "Job", "arcface_job_state")]
NODE = [choice("node", "Node", "arcface_coordinator_heartbeat_age_seconds")]
SOME = 'job_id=~"$job_id"'
ONE = 'job_id="$job_id"'
AT = 'node="$node"'


def overview():
    return dashboard("arcface-overview", "ArcFace / Cluster", "What the cluster does: who leads, nodes, slots, jobs and calls.", [
        stat("Leaders", "Coordinators that lead. One is right.", "sum(arcface_coordinator_is_leader)",
             steps=[(None, RED), (1, GREEN), (2, RED)], links=["no_leader", "two_leaders"]),
        stat("Nodes", "Nodes by state; a lost one is forgotten after ten minutes.", "sum by (state) (arcface_coordinator_nodes)",
             legend="{{state}}", size=(6, 4), links=["node_lost"]),
        stat("Slots used", "Share of the slots of healthy nodes that run a rank.",
             'sum(arcface_coordinator_slots{use="used"}) / (sum(arcface_coordinator_slots) > 0)', "percentunit", decimals=0),
        stat("Samples a second", "All jobs together, mean of five minutes.", "sum(job_id:arcface_train_samples:rate5m)", decimals=0),
        stat("Alerts", "Alerts of this cluster that fire, those for the record included.",
             'count(ALERTS{alertname=~"Arcface.*", alertstate="firing"}) or vector(0)', steps=[(None, GREEN), (1, YELLOW)], size=(6, 4)),
        table("Jobs", "Jobs that run or ended within a quarter of an hour. A click on the id opens the job.", [
            (None, "max by (job_id, name, backbone, head) (arcface_job_info)", None),
            (None, "max by (job_id, state) (arcface_job_state) == 1", None),
            ("ranks", "max by (job_id) (arcface_job_world_size)", "short"),
            ("progress", f"max by (job_id) (arcface_train_progress_ratio)", "percentunit"),
            ("samples/s", "max by (job_id) (arcface_train_samples_per_second)", "short"),
            ("loss", "max by (job_id) (arcface_train_loss)", "short"),
            ("left", "max by (job_id) (arcface_train_eta_seconds)", "dtdurations"),
            ("checkpoint age", "job_id:arcface_checkpoint_age:seconds", "dtdurations"),
        ], (24, 8), "job_id", goto="arcface-job"),
        graph("Jobs by state", "How many jobs are in each state.", [("sum by (state) (arcface_job_state) > 0", "{{state}}")],
              stacked=True, links=["job_queued", "job_failed"]),
        graph("Samples a second by job", "Mean of five minutes.", [("job_id:arcface_train_samples:rate5m", "{{job_id}}")], links=["speed_dropped"]),
        graph("Slots", "Slots of healthy nodes.", [("sum by (use) (arcface_coordinator_slots)", "{{use}}")], stacked=True),
        graph("Nodes", "Nodes by state.", [("sum by (state) (arcface_coordinator_nodes)", "{{state}}")], stacked=True, links=["node_lost"]),
        graph("Heartbeat age", "Age of the newest heartbeat. Half a second is usual, 1.5 s makes a node suspect, 3 s lost.",
              [("max by (node) (arcface_coordinator_heartbeat_age_seconds)", "{{node}}")], "s", steps=[(None, GREEN), (1.5, YELLOW), (3, RED)],
              links=["node_slow"]),
        graph("Leaders", "1 for the coordinator that leads.", [("arcface_coordinator_is_leader", "{{instance}}")], links=["no_leader", "two_leaders"]),
        graph("Calls", "Calls answered a second, by status code.",
              [("sum by (code) (rate(arcface_grpc_requests_total[$__rate_interval]))", "{{code}}")], "reqps", links=["calls_fail"]),
        graph("Call duration, p99", "Seconds until the coordinator answered, by method.",
              [("service_method:arcface_grpc_request_duration_seconds:p99_5m", "{{method}}")], "s"),
        table("Alerts that fire", "Each has a page among the runbooks, named after it.", [
            (None, 'ALERTS{alertname=~"Arcface.*", alertstate="firing"}', None),
        ], (24, 6), "alertname", hidden=["__name__", "alertstate", "cluster"]),
    ])


def job():
    return dashboard("arcface-job", "ArcFace / Job", "One job: state, speed, learning, evaluations.", [
        stat("State", "State that the job is in.", f"max by (state) (arcface_job_state{{{ONE}}}) == 1", legend="{{state}}", words=True,
             links=["job_failed", "job_recovering"]),
        stat("Ranks", "Ranks of the newest generation.", f"max(arcface_job_world_size{{{ONE}}})", size=(3, 4), links=["job_shrunk"]),
        stat("Ranks asked for", "Ranks that the job file asks for.", f"max(arcface_job_world_size_target{{{ONE}}})", size=(3, 4)),
        stat("Progress", "Share of the steps that are done.", f"max(arcface_train_progress_ratio{{{ONE}}})", "percentunit", decimals=1),
        stat("Time left", "At the present speed.", f"max(arcface_train_eta_seconds{{{ONE}}})", "dtdurations"),
        stat("Running", "Share of the last hour that the job trained in; the rest went into waiting, starting and recovering.",
             "max(job_id:arcface_job_running:ratio1h{" + ONE + "})", "percentunit", decimals=1, steps=[(None, RED), (0.8, YELLOW), (0.9, GREEN)],
             size=(3, 4), links=["job_recovering"]),
        stat("Goodput", "Share of the last hour, waiting for the first ranks left out, that went into steps which were not lost.",
             f"max(job_id:arcface_job_goodput:ratio1h{{{ONE}}})", "percentunit", decimals=1, steps=[(None, RED), (0.8, YELLOW), (0.9, GREEN)],
             size=(3, 4), links=["goodput_low"]),
        graph("Loss", "Mean of each log interval.", [(f"max(arcface_train_loss{{{ONE}}})", "loss")], links=["steps_not_finite"]),
        graph("Samples a second", "All ranks: as rank 0 reports it, and as the counter shows it (with pauses and recoveries).", [
            (f"max(arcface_train_samples_per_second{{{ONE}}})", "reported"),
            (f"sum(rate(arcface_train_samples_total{{{ONE}}}[$__rate_interval]))", "counted"),
        ], links=["speed_dropped", "training_stalled"]),
        graph("Step duration", "Seconds a step on rank 0.", [
            (f"histogram_quantile(0.5, sum by (le) (rate(arcface_train_step_duration_seconds_bucket{{{ONE}}}[$__rate_interval])))", "p50"),
            (f"histogram_quantile(0.95, sum by (le) (rate(arcface_train_step_duration_seconds_bucket{{{ONE}}}[$__rate_interval])))", "p95"),
            (f"histogram_quantile(0.99, sum by (le) (rate(arcface_train_step_duration_seconds_bucket{{{ONE}}}[$__rate_interval])))", "p99"),
        ], "s"),
        graph("Where the time goes", "Share of the time of rank 0 by phase, mean of five minutes.",
              [(f"job_id_phase:arcface_train_phase_seconds:share5m{{{ONE}}}", "{{phase}}")], "percentunit", stacked=True, top=1, links=["data_wait"]),
        graph("Learning rate", "Of the last step.", [(f"max(arcface_train_learning_rate{{{ONE}}})", "learning rate")], "sci", size=(8, 7)),
        graph("Gradient norm", "Of the backbone, before clipping.", [(f"max(arcface_train_grad_norm{{{ONE}}})", "norm")], size=(8, 7)),
        graph("Embedding norm", "Mean of the last log interval. It falls where the network unlearns and grows without bound where it diverges.",
              [(f"max(arcface_embedding_norm{{{ONE}}})", "norm")], size=(8, 7)),
        graph("Target cosine", "Of samples with their own class, before the margin, mean over all ranks: how well classes are learnt.",
              [(f"max(arcface_head_target_cosine{{{ONE}}})", "cosine")], size=(8, 7)),
        graph("What the time went into", "Seconds in five minutes: steps that count, steps that were lost and done again, starting and failing, checkpoints, "
              "waiting for the first ranks.",
              [(f"sum by (kind) (increase(arcface_job_time_seconds_total{{{ONE}}}[5m]))", "{{kind}}")], "s", stacked=True, size=(8, 7),
              links=["goodput_low"]),
        graph("Loss scale (fp16)", "Only of jobs that train in fp16.", [(f"max(arcface_train_loss_scale{{{ONE}}})", "scale")], size=(8, 7)),
        graph("Verification accuracy", "Newest result of each data set.", [(f"max by (dataset) (arcface_eval_accuracy_ratio{{{ONE}}})", "{{dataset}}")],
              "percentunit", points=True, links=["accuracy_regressed"]),
        graph("True accept rate", "At the false accept rate in the legend.",
              [(f"max by (dataset, far) (arcface_eval_tar_ratio{{{ONE}}})", "{{dataset}} at {{far}}")], "percentunit", points=True),
        graph("Evaluation time", "Seconds that the newest evaluation took.", [(f"max by (dataset) (arcface_eval_duration_seconds{{{ONE}}})", "{{dataset}}")],
              "s", size=(8, 7)),
        graph("Steps left out", "Steps with a loss or gradient that was not finite, and times that the job went back to leave one out.", [
            (f"sum(increase(arcface_train_nonfinite_steps_total{{{ONE}}}[$__rate_interval]))", "not finite"),
            (f"sum(increase(arcface_train_rollbacks_total{{{ONE}}}[$__rate_interval]))", "went back"),
        ], bars=True, size=(8, 7), links=["steps_not_finite"]),
        graph("Generation", "Grows by one with every failure, drained node or change of size.", [(f"max(arcface_rendezvous_generation{{{ONE}}})", "generation")],
              size=(8, 7), links=["rank_failed"]),
    ], JOB, generations=ONE)


def node():
    return dashboard("arcface-node", "ArcFace / Node", "One node: its agent and its ranks. What the machine itself does is told by node_exporter and "
                     "dcgm-exporter.", [
        stat("Joined", "1 while the agent is joined to a coordinator.", f"max(arcface_agent_joined{{{AT}}})", steps=[(None, RED), (1, GREEN)],
             links=["node_lost"]),
        stat("Ranks", "Rank processes that run.", f"max(arcface_agent_ranks{{{AT}}})"),
        stat("Slots", "Ranks that it can run at once.", f"max(arcface_agent_slots{{{AT}}})"),
        stat("Heartbeat age", "As the coordinator sees it.", f"max(arcface_coordinator_heartbeat_age_seconds{{{AT}}})", "s", decimals=1,
             steps=[(None, GREEN), (1.5, YELLOW), (3, RED)], links=["node_slow"]),
        stat("Ranks hung", "Rank processes that were killed because they made no progress, within the time range.",
             f"sum(increase(arcface_agent_rank_hangs_total{{{AT}}}[$__range]))", decimals=0, steps=[(None, GREEN), (0.5, YELLOW)],
             links=["rank_failed"]),
        stat("Version", "Of the worker.", f"max by (version) (arcface_build_info{{{AT}}})", legend="{{version}}", words=True),
        graph("Ranks and slots", "Rank processes, and how many there can be.", [
            (f"max(arcface_agent_ranks{{{AT}}})", "ranks"), (f"max(arcface_agent_slots{{{AT}}})", "slots")]),
        graph("Heartbeat age", "From both ends: the coordinator's view falls behind when the network does.", [
            (f"max(arcface_coordinator_heartbeat_age_seconds{{{AT}}})", "coordinator"),
            (f"max(arcface_agent_heartbeat_age_seconds{{{AT}}})", "agent"),
        ], "s", steps=[(None, GREEN), (1.5, YELLOW), (3, RED)], links=["node_slow", "node_lost"]),
        graph("Ranks started and ended", "Rank processes in each interval, by how they ended.", [
            (f"sum(increase(arcface_agent_rank_starts_total{{{AT}}}[$__rate_interval]))", "started"),
            (f"sum by (outcome) (increase(arcface_agent_rank_exits_total{{{AT}}}[$__rate_interval]))", "ended: {{outcome}}"),
        ], bars=True, links=["rank_failed"]),
        graph("Connections lost", "Times that the agent lost its coordinator.",
              [(f"sum(increase(arcface_agent_connections_lost_total{{{AT}}}[$__rate_interval]))", "lost")], bars=True, links=["no_leader"]),
        graph("Heartbeats a second", "Acknowledged by the coordinator. Two are usual.",
              [(f"sum(rate(arcface_agent_heartbeats_total{{{AT}}}[$__rate_interval]))", "acknowledged")]),
        graph("Joined", "1 while joined.", [(f"max(arcface_agent_joined{{{AT}}})", "joined")]),
    ], NODE)


def recovery():
    return dashboard("arcface-recovery", "ArcFace / Recovery and checkpoints", "What failed, what it cost, and what there is to come back to.", [
        stat("Failures", "Failures that ended a generation, within the time range.",
             f'sum(increase(arcface_worker_failures_total{{{SOME}, reason!~"drained|grown"}}[$__range]))', decimals=0,
             steps=[(None, GREEN), (0.5, YELLOW)], links=["rank_failed", "job_crash_loop"]),
        stat("Restarts", "Generations that were opened after the first, within the time range.",
             f"sum(increase(arcface_worker_restarts_total{{{SOME}}}[$__range]))", decimals=0),
        stat("Recovery, mean", "From the last sign of life to the next new step, since the coordinator took over.",
             f'sum(arcface_recovery_duration_seconds_sum{{{SOME}, stage="total"}}) / '
             f'(sum(arcface_recovery_duration_seconds_count{{{SOME}, stage="total"}}) > 0)', "s", decimals=1),
        stat("Oldest checkpoint", "Largest age of a running job's newest committed checkpoint.", f"max(job_id:arcface_checkpoint_age:seconds{{{SOME}}})",
             "dtdurations", steps=[(None, GREEN), (3600, YELLOW), (7200, RED)], links=["checkpoint_old"]),
        stat("Damaged", "Committed checkpoints that did not verify, within the time range.",
             f"sum(increase(arcface_checkpoint_damaged_total{{{SOME}}}[$__range]))", decimals=0, steps=[(None, GREEN), (0.5, RED)],
             links=["checkpoint_damaged"]),
        stat("Goodput", "Least share of the last hour of a job that went into steps which were not lost.",
             f"min(job_id:arcface_job_goodput:ratio1h{{{SOME}}})", "percentunit", decimals=1, steps=[(None, RED), (0.8, YELLOW), (0.9, GREEN)],
             links=["goodput_low"]),
        graph("Failures by reason", "Failures that ended a generation, in each interval.",
              [(f"sum by (job_id, reason) (increase(arcface_worker_failures_total{{{SOME}}}[$__rate_interval])) > 0", "{{job_id}}: {{reason}}")],
              bars=True, links=["rank_failed", "job_crash_loop"]),
        # Means since the beginning: these series begin with their first event, in which rate() sees no increase.
        graph("Recovery by stage", "Mean seconds since the coordinator took over: from the last sign of life until the failure was seen (detect), from the launch "
              "until the ranks had met (rendezvous), until they could train (load), and all of it until the next new step (total).",
              [(f"sum by (stage) (arcface_recovery_duration_seconds_sum{{{SOME}}}) / "
                f"(sum by (stage) (arcface_recovery_duration_seconds_count{{{SOME}}}) > 0)", "{{stage}}")],
              "s", links=["job_recovering"]),
        graph("Generation", "Grows by one with every failure, drained node or change of size.",
              [(f"max by (job_id) (arcface_rendezvous_generation{{{SOME}}})", "{{job_id}}")]),
        graph("Rendezvous, mean", "Seconds from the launch of a generation until its ranks had met, since the coordinator took over.",
              [(f"sum by (job_id) (arcface_rendezvous_duration_seconds_sum{{{SOME}}}) / "
                f"(sum by (job_id) (arcface_rendezvous_duration_seconds_count{{{SOME}}}) > 0)", "{{job_id}}")],
              "s", links=["job_recovering"]),
        graph("Checkpoint age", "Since the newest committed checkpoint of jobs that run: what a failure now would cost.",
              [(f"job_id:arcface_checkpoint_age:seconds{{{SOME}}}", "{{job_id}}")], "s", links=["checkpoint_old"]),
        graph("Last committed step", "Step of the newest committed checkpoint.",
              [(f"max by (job_id) (arcface_checkpoint_last_committed_step{{{SOME}}})", "{{job_id}}")], links=["checkpoint_old"]),
        graph("Checkpoint size", "Bytes of the newest committed checkpoint, all parts.",
              [(f"max by (job_id) (arcface_checkpoint_bytes{{{SOME}}})", "{{job_id}}")], "bytes", size=(8, 7)),
        graph("Checkpoint stall", "Seconds that the last checkpoint held up training on rank 0.",
              [(f"max by (job_id) (arcface_checkpoint_stall_seconds{{{SOME}}})", "{{job_id}}")], "s", size=(8, 7)),
        graph("Suggested interval", "Seconds between checkpoints that would lose the least time at that stall (Young's rule).",
              [(f"max by (job_id) (arcface_checkpoint_suggested_interval_seconds{{{SOME}}})", "{{job_id}}")], "s", size=(8, 7)),
        graph("Persist time, mean", "Seconds that the slowest rank took to write its parts of a committed checkpoint, since the coordinator took over. "
              "Training goes on meanwhile.",
              [(f"sum by (job_id) (arcface_checkpoint_persist_seconds_sum{{{SOME}}}) / "
                f"(sum by (job_id) (arcface_checkpoint_persist_seconds_count{{{SOME}}}) > 0)", "{{job_id}}")], "s", size=(8, 7)),
        graph("Restore time, mean", "Seconds that a rank took to read, verify and take over what it resumed from, since the coordinator took over.",
              [(f"sum by (job_id) (arcface_checkpoint_restore_seconds_sum{{{SOME}}}) / "
                f"(sum by (job_id) (arcface_checkpoint_restore_seconds_count{{{SOME}}}) > 0)", "{{job_id}}")], "s", size=(8, 7)),
        graph("Failures of checkpoints", "By stage, in each interval: parts that were not written, a store that did not take one, files that did not go away or "
              "did not verify.",
              [(f"sum by (stage) (increase(arcface_checkpoint_failures_total{{{SOME}}}[$__rate_interval]))", "{{stage}}")], bars=True, size=(8, 7),
              links=["checkpoint_fails", "checkpoint_damaged"]),
    ], JOBS, generations=SOME)


def data():
    return dashboard("arcface-data", "ArcFace / Data pipeline", "Whether training waits for data. Waiting is measured on rank 0, reading and decoding on all "
                     "ranks.", [
        stat("Waiting for data", "Share of the time of rank 0, mean of five minutes, of the job that waits most.",
             f'max(job_id_phase:arcface_train_phase_seconds:share5m{{{SOME}, phase="data_wait"}})', "percentunit", decimals=1,
             steps=[(None, GREEN), (0.05, YELLOW), (0.1, RED)], size=(6, 4), links=["data_wait"]),
        stat("Samples a second", "All chosen jobs, mean of five minutes.", f"sum(job_id:arcface_train_samples:rate5m{{{SOME}}})", size=(6, 4), decimals=0),
        stat("Samples a second and rank", "Least of the chosen jobs, mean of five minutes.", f"min(job_id:arcface_train_samples_per_rank:rate5m{{{SOME}}})",
             size=(6, 4), decimals=0, links=["speed_dropped"]),
        stat("Samples read", "Within the time range.", f"sum(increase(arcface_train_samples_total{{{SOME}}}[$__range]))", size=(6, 4), decimals=0),
        graph("Waiting for data", "Share of the time of rank 0. Over 10 % the loader is what limits training.",
              [(f'job_id_phase:arcface_train_phase_seconds:share5m{{{SOME}, phase="data_wait"}}', "{{job_id}}")], "percentunit",
              steps=[(None, GREEN), (0.1, RED)], links=["data_wait"]),
        graph("Waiting for data, a step", "Seconds of a step in which rank 0 waited.",
              [(f'sum by (job_id) (rate(arcface_train_phase_seconds_total{{{SOME}, phase="data_wait"}}[5m])) / '
                f"(sum by (job_id) (rate(arcface_train_steps_total{{{SOME}}}[5m])) > 0)", "{{job_id}}")], "s", links=["data_wait"]),
        graph("Samples a second and rank", "Mean of five minutes: comparable over time although ranks come and go.",
              [(f"job_id:arcface_train_samples_per_rank:rate5m{{{SOME}}}", "{{job_id}}")], links=["speed_dropped"]),
        graph("Step duration, p95", "Of rank 0, mean of five minutes. A spread that grows with data_wait points at storage.",
              [(f"job_id:arcface_train_step_duration_seconds:p95_5m{{{SOME}}}", "{{job_id}}")], "s"),
        graph("Where the time goes", "Share of the time of rank 0 by phase.",
              [(f"sum by (phase) (rate(arcface_train_phase_seconds_total{{{SOME}}}[5m])) / ignoring (phase) group_left () "
                f"(sum(rate(arcface_train_phase_seconds_total{{{SOME}}}[5m])) > 0)", "{{phase}}")], "percentunit", stacked=True, top=1),
        graph("Samples", "Counted since the coordinator took over, steps done again counted again.",
              [(f"sum by (job_id) (arcface_train_samples_total{{{SOME}}})", "{{job_id}}")]),
        graph("Queue depth", "Micro-batches that lie ready on each rank, four at most. None means that training waits.",
              [(f"max by (job_id, rank) (arcface_data_queue_depth{{{SOME}}})", "{{job_id}}: {{rank}}")], links=["data_wait"]),
        graph("Decode time", "Seconds that a loader thread takes to read and decode an image, on all ranks.", [
            (f"histogram_quantile(0.5, sum by (job_id, le) (rate(arcface_data_decode_seconds_bucket{{{SOME}}}[5m])))", "{{job_id}}: p50"),
            (f"histogram_quantile(0.95, sum by (job_id, le) (rate(arcface_data_decode_seconds_bucket{{{SOME}}}[5m])))", "{{job_id}}: p95"),
        ], "s", links=["data_wait"]),
        graph("Images loaded", "A second, all ranks, ahead of training; and those of them that data.cache had.", [
            (f"sum by (job_id) (rate(arcface_data_samples_total{{{SOME}}}[$__rate_interval]))", "{{job_id}}"),
            (f"sum by (job_id) (rate(arcface_data_cached_samples_total{{{SOME}}}[$__rate_interval]))", "{{job_id}}: cached"),
        ], size=(8, 7)),
        graph("Bytes read", "A second, all ranks, as images lie in the data set.",
              [(f"sum by (job_id) (rate(arcface_data_bytes_total{{{SOME}}}[$__rate_interval]))", "{{job_id}}")], "Bps", size=(8, 7)),
        graph("Records that cannot be read", "In each interval.",
              [(f"sum by (job_id) (increase(arcface_data_errors_total{{{SOME}}}[$__rate_interval]))", "{{job_id}}")], bars=True, size=(8, 7),
              links=["job_failed"]),
    ], JOBS, generations=SOME)


def ranks():
    return dashboard("arcface-ranks", "ArcFace / Head and network", "What the ranks of one job do: the shards of its classes, and their collective operations.", [
        stat("Classes", "Over all ranks.", f"max(arcface_head_classes{{{ONE}}})", size=(6, 4), decimals=0),
        stat("Rows a shard", "The largest.", f"max(arcface_head_shard_rows{{{ONE}}})", size=(6, 4), decimals=0),
        stat("Arithmetic", "Of the backbone, all ranks, mean of five minutes: samples a second times the operations to train on one.",
             f"sum(job_id:arcface_train_samples:rate5m{{{ONE}}}) * max(arcface_train_flops_per_sample{{{ONE}}})", "flops", size=(6, 4), decimals=1),
        stat("Target cosine", "Of samples with their own class, before the margin.", f"max(arcface_head_target_cosine{{{ONE}}})", size=(6, 4), decimals=3),
        graph("Rows per shard", "Classes of each rank.", [(f"max by (rank) (arcface_head_shard_rows{{{ONE}}})", "{{rank}}")]),
        graph("Sampled and positive rows", "Of the newest micro-batch, all ranks: classes in the softmax, and those that have samples in it.", [
            (f"sum(arcface_head_sampled_rows{{{ONE}}})", "sampled"), (f"sum(arcface_head_positive_rows{{{ONE}}})", "positive")]),
        graph("Sample ratio", "Share of each rank's shard that is in the softmax.", [(f"max by (rank) (arcface_head_sample_ratio{{{ONE}}})", "{{rank}}")],
              "percentunit", top=1),
        graph("Time in the head", "Share of the time of rank 0, mean of five minutes.",
              [(f'job_id_phase:arcface_train_phase_seconds:share5m{{{ONE}, phase="head"}}', "head")], "percentunit"),
        graph("Collective latency, mean", "Seconds of a call on a rank, waiting for the slowest rank included.",
              [(f"sum by (op) (rate(arcface_comm_collective_seconds_sum{{{ONE}}}[5m])) / (sum by (op) (rate(arcface_comm_collective_seconds_count{{{ONE}}}[5m])) > 0)",
                "{{op}}")], "s", links=["straggler"]),
        graph("Collective latency, p99", "By operation.",
              [(f"histogram_quantile(0.99, sum by (op, le) (rate(arcface_comm_collective_seconds_bucket{{{ONE}}}[5m])))", "{{op}}")], "s", links=["straggler"]),
        graph("Bytes", "A second, all ranks, as they are given to the operations; a ring sends up to twice that.",
              [(f"sum by (op) (rate(arcface_comm_bytes_total{{{ONE}}}[$__rate_interval]))", "{{op}}")], "Bps"),
        graph("Calls", "A second, all ranks.",
              [(f"sum by (op) (rate(arcface_comm_collective_seconds_count{{{ONE}}}[$__rate_interval]))", "{{op}}")], "ops"),
    ], JOB, generations=ONE)


def main():
    check = "--check" in sys.argv[1:]
    files = {made["uid"].removeprefix("arcface-") + ".json": made for made in (overview(), job(), node(), recovery(), data(), ranks())}
    stale = [path.name for path in FOLDER.glob("*.json") if path.name not in files]
    for name, made in files.items():
        text = json.dumps(made, indent=2, sort_keys=True) + "\n"
        path = FOLDER / name
        if check:
            if not path.is_file() or path.read_text() != text:
                stale.append(name)
        else:
            path.write_text(text)
    if stale:
        print(f"not what deploy/grafana/generate.py writes: {', '.join(sorted(stale))}", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
