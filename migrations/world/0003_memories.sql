-- What agents remember: free text, one for the project (owner '') and one for each agent by name.

create table memories (
    project_id uuid not null,
    owner text not null,
    content text not null constraint memories_content_size check (octet_length(content) <= 262144),
    updated_at timestamptz not null default now(),
    primary key (project_id, owner)
);
