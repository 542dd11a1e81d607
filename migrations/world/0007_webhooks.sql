-- Other systems that are told of a project's events, and what became of the telling.

-- Couriers carry deliveries: their jobs are lane 1, with places of their own, so that receivers that are slow or dead
-- keep nobody from working.
alter table jobs add column lane smallint not null default 0;
-- A courier that no event wakes, but its time: its receiver fails, or its backlog is full.
alter table jobs add column quiet boolean not null default false;

drop index jobs_ready;
create index jobs_ready on jobs (lane, project_id, priority desc, created_at) where ready;
drop index jobs_timed;
create index jobs_timed on jobs (lane, due_at) where not ready;

create table webhooks (
    project_id uuid not null,
    id uuid not null,
    url text not null,
    -- Patterns of event names.
    events text[] not null,
    sealed_with text not null,
    sealed_secret bytea not null,
    -- The secret before, which signs as well until then.
    previous_sealed_with text,
    previous_secret bytea,
    previous_until timestamptz,
    enabled boolean not null default true,
    disabled_reason text,
    -- The number of the last event that was looked at.
    cursor bigint not null,
    -- Grows with each change that a courier at work must hear of.
    revision bigint not null default 0,
    -- When the first of the failures since the last success was, how many there were, and until when all rests for them.
    failing_since timestamptz,
    failures integer not null default 0,
    resume_at timestamptz,
    created_at timestamptz not null,
    updated_at timestamptz not null,
    primary key (project_id, id)
) with (fillfactor = 50);

-- An event on its way to a webhook.
create table deliveries (
    project_id uuid not null,
    id uuid not null,
    webhook_id uuid not null,
    -- The event's number and name.
    seq bigint not null,
    event text not null,
    -- What the event is about: of one of these, deliveries go out in their order.
    resource text not null,
    -- As it is sent.
    body text not null,
    status text not null check (status in ('pending', 'delivered', 'failed')),
    attempts integer not null default 0,
    -- When it is tried next, while it is pending.
    next_at timestamptz,
    first_attempt_at timestamptz,
    created_at timestamptz not null,
    ended_at timestamptz,
    primary key (project_id, id),
    constraint deliveries_webhook_fkey foreign key (project_id, webhook_id) references webhooks (project_id, id) on delete cascade
);

create unique index deliveries_by_event on deliveries (project_id, webhook_id, seq);
create index deliveries_by_status on deliveries (project_id, webhook_id, status, seq);
create index deliveries_ended on deliveries (ended_at) where ended_at is not null;

create table delivery_attempts (
    project_id uuid not null,
    delivery_id uuid not null,
    number integer not null,
    at timestamptz not null,
    -- The receiver's answer, or why there was none.
    status_code integer,
    error text,
    duration_ms integer not null,
    -- The beginning of what the receiver said.
    response text,
    primary key (project_id, delivery_id, number),
    constraint attempts_delivery_fkey foreign key (project_id, delivery_id) references deliveries (project_id, id) on delete cascade
);
