//! The one table from errors to gRPC status codes, with `google.rpc` details.

use crate::control::ControlError;
use arcface_proto::convert::FieldViolation;
use std::time::Duration;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, FieldViolation as BadField, StatusExt};

/// When a client may try again what failed for now.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// The coordinator is being shut down; jobs go on.
pub fn stopping() -> Status {
    from_control(ControlError::Unavailable("the coordinator is stopping".into()))
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
