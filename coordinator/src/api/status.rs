//! The one table from errors to gRPC status codes, with `google.rpc` details.

use crate::control::ControlError;
use arcface_proto::{convert::FieldViolation, redirect};
use std::{collections::HashMap, time::Duration};
use tonic::{Code, Status, metadata::MetadataMap};
use tonic_types::{ErrorDetails, FieldViolation as BadField, StatusExt};

/// When a client may try again what failed for now.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// The coordinator is being shut down; jobs go on.
pub fn stopping() -> Status {
    from_control(ControlError::Unavailable("the coordinator is stopping".into()))
}

/// UNAVAILABLE, because another coordinator (or this one, later) does answer: clients of every kind try again. Who
/// that is stands in the metadata and in a `google.rpc.ErrorInfo`.
pub fn not_leading(leader: Option<&str>) -> Status {
    let message = match leader {
        Some(leader) => format!("this coordinator stands by: {leader} leads"),
        None => "this coordinator stands by: no coordinator leads at the moment".to_owned(),
    };
    let mut details = ErrorDetails::with_retry_info(Some(RETRY_AFTER));
    let named = leader.map(|leader| (redirect::LEADER.to_owned(), leader.to_owned()));
    details.set_error_info(redirect::NOT_LEADING, redirect::DOMAIN, HashMap::from_iter(named));
    let mut metadata = MetadataMap::new();
    metadata.insert(
        redirect::ROLE,
        tonic::metadata::MetadataValue::from_static(redirect::STANDBY),
    );
    if let Some(leader) = leader.and_then(|leader| leader.parse().ok()) {
        metadata.insert(redirect::LEADER, leader);
    }
    Status::with_error_details_and_metadata(Code::Unavailable, message, details, metadata)
}

/// Status of an error of the control task.
pub fn from_control(error: ControlError) -> Status {
    let message = error.to_string();
    match error {
        ControlError::Invalid { violations } => from_violations(&violations),
        ControlError::NotFound { .. } => Status::new(Code::NotFound, message),
        ControlError::AlreadyExists(_) => Status::new(Code::AlreadyExists, message),
        ControlError::Refused(_) => Status::new(Code::FailedPrecondition, message),
        ControlError::Aborted(_) => Status::new(Code::Aborted, message),
        ControlError::Deadline(_) => Status::new(Code::DeadlineExceeded, message),
        ControlError::Exhausted(_) => Status::new(Code::ResourceExhausted, message),
        ControlError::Unavailable(_) => Status::with_error_details(
            Code::Unavailable,
            message,
            ErrorDetails::with_retry_info(Some(RETRY_AFTER)),
        ),
    }
}

/// INVALID_ARGUMENT with a `google.rpc.BadRequest` that lists every bad field by its path.
pub fn from_violations(violations: &[FieldViolation]) -> Status {
    let fields: Vec<BadField> = violations
        .iter()
        .map(|violation| {
            let description = match violation.hint.is_empty() {
                true => violation.problem.clone(),
                false => format!("{} (hint: {})", violation.problem, violation.hint),
            };
            BadField::new(violation.path.as_str(), description)
        })
        .collect();
    let message = violations
        .iter()
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join("; ");
    Status::with_error_details(
        Code::InvalidArgument,
        message,
        ErrorDetails::with_bad_request(fields),
    )
}

/// One bad field.
pub fn invalid(path: &str, problem: impl Into<String>) -> Status {
    from_control(ControlError::invalid(path, problem))
}
