//! `millrace permissions`: what a role needs of the broker, for its configuration or a user's JWT.

use millrace_crds::config::NatsConfig;
use millrace_crds::permissions::{Permissions, Role};

use crate::args::{Global, PermissionsArgs, RoleName};
use crate::failure::{Failure, Verdict};
use crate::output::Printer;

/// Runs the command; no broker is asked.
///
/// # Errors
/// [`Failure::Usage`] where a role is of one model and none is named.
pub fn run(global: &Global, args: &PermissionsArgs) -> Result<Verdict, Failure> {
    let printer = Printer { json: global.json };
    let (role, who) = match args.role {
        RoleName::Operator => (Role::Operator, "the operator, or whoever makes streams and keys".to_owned()),
        RoleName::Gateway => (Role::Gateway, "a gateway, for all models".to_owned()),
        RoleName::Worker => (Role::Worker(global.model()?), format!("a worker of {}", global.model()?)),
        RoleName::Tenant => {
            (Role::Tenant(global.model()?), format!("a user of the model {}", global.model()?))
        }
    };
    let api = NatsConfig {
        domain: global.broker.js_domain.clone(),
        api_prefix: global.broker.js_api_prefix.clone(),
        ..NatsConfig::default()
    };
    let permissions = Permissions::of(&role, &api.api());
    printer.object(&permissions.json());
    let prefix = &permissions.inbox_prefix;
    let inbox = match args.role {
        RoleName::Worker | RoleName::Gateway => format!("Replies come below {prefix}."),
        _ => format!("Replies come below {prefix}: set MILLRACE_INBOX_PREFIX={prefix} for the command line."),
    };
    printer.say(&format!("# For {who}.\n# {inbox}\n{}", permissions.text().trim_end()));
    Ok(Verdict::Well)
}
