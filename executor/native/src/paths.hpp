// Which paths this processor can run.
#pragma once

#include <string>
#include <vector>

#include "kernels.hpp"

namespace native {

// The fastest first, but for `portable_tiles_path`.
const std::vector<const Path*>& paths();

// Any of them, that one, or the one of AMX's tiles, which tests take where these are done in software;
// std::invalid_argument if there is none.
const Path& path_named(const std::string& name);

}  // namespace native
