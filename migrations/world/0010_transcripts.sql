-- What a task's run was told: the first message of its transcript. The task's own description may be another one by now.
alter table runs add column said text;
